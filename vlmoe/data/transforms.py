"""Pixels of a picture -> pixels of the model's size. All randomness comes from the generator that is passed in.

All of it runs on uint8 tensors: resizing them is much faster than Pillow's, and a batch of them goes through the loader's
processes in a quarter of the memory. `to_float` comes last, where the batch is used.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from vlmoe.data import augment

MAX_ASPECT = 4 / 3  # of a random crop, either way
CROP_TRIES = 10


def train_transform(
    pixels: UInt8[Tensor, "3 h w"],
    rng: np.random.Generator,
    *,
    image_size: int,
    crop_scale: float = 0.8,
    flip: bool = False,
    color_jitter: float = 0.0,
    rand_augment: int = 0,
) -> UInt8[Tensor, "3 height width"]:
    """Random resized crop (Szegedy et al. 2015, arXiv:1409.4842, section 6), then what is asked for of
    flip, RandAugment and colour jitter.

    Args:
        pixels: RGB, any size.
        rng: the sample's own.
        image_size: height and width of the result, pixels.
        crop_scale: least share of the area that the crop keeps; 1.0 is a plain resize, as in `eval_transform`.
        flip: mirror every second picture. Leave it off where captions speak of left and right.
        rand_augment: operations to draw, see `vlmoe.data.augment`.
        color_jitter: brightness, contrast and saturation are each scaled by a factor in 1 -/+ this, in random order.

    Returns:
        uint8 [3, image_size, image_size].
    """
    if crop_scale < 1.0:
        top, left, height, width = random_crop(pixels.shape[1], pixels.shape[2], rng, least_area=crop_scale)
        pixels = pixels[:, top : top + height, left : left + width]
    pixels = _resize(pixels, image_size)
    if flip and rng.random() < 0.5:
        pixels = pixels.flip(-1)
    if rand_augment:
        pixels = augment.rand_augment(pixels, rng, operations=rand_augment)
    if color_jitter > 0.0:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
        for which in rng.permutation(len(adjust)):
            pixels = adjust[which](pixels, float(rng.uniform(max(0.0, 1.0 - color_jitter), 1.0 + color_jitter)))
    return pixels


def eval_transform(pixels: UInt8[Tensor, "3 h w"], *, image_size: int) -> UInt8[Tensor, "3 height width"]:
    """The whole picture resized to a square: uint8 [3, image_size, image_size]."""
    return _resize(pixels, image_size)


def to_float(pixels: UInt8[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """float32 in [-1, 1], the range that models read."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def random_crop(height: int, width: int, rng: np.random.Generator, *, least_area: float) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) with at least that share of the area and an aspect ratio of 3/4 to 4/3.

    Where ten draws do not fit into the picture, as happens with long ones: the largest centred box of that aspect.
    """
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(least_area, 1.0)
        aspect = MAX_ASPECT ** rng.uniform(-1.0, 1.0)
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height = min(height, max(1, round(width * MAX_ASPECT)))
    crop_width = min(width, max(1, round(height * MAX_ASPECT)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _resize(pixels: UInt8[Tensor, "3 h w"], image_size: int) -> UInt8[Tensor, "3 height width"]:
    pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # what torch has a fast path for
    return TF.resize(pixels, [image_size, image_size], interpolation=InterpolationMode.BICUBIC, antialias=True)
