"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) in the form that the released BEiT-3 models were fine-tuned with.

Ten operations, none of which changes hues; each drawn one is carried out with probability 1/2, at strength 7 of 10.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

STRENGTH = 0.7
ENHANCE = 0.1 + 1.8 * STRENGTH  # factor of brightness and sharpness
SHEAR = math.degrees(math.atan(0.3 * STRENGTH))
SHIFT = 10 * STRENGTH  # pixels
ROTATION = 30 * STRENGTH  # degrees
GREY = [128.0]  # what comes into view

Pixels = UInt8[Tensor, "3 height width"]


def _move(
    pixels: Pixels, *, shift: tuple[float, float] = (0.0, 0.0), shear: tuple[float, float] = (0.0, 0.0)
) -> Pixels:
    return TF.affine(
        pixels, angle=0.0, translate=list(shift), scale=1.0, shear=list(shear), center=[0.0, 0.0], fill=GREY,
        interpolation=InterpolationMode.BILINEAR,
    )  # fmt: skip


# name -> operation on (pixels, sign); the sign is -1 or 1, and only moves and turns heed it
OPERATIONS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "identity": lambda pixels, _: pixels,
    "autocontrast": lambda pixels, _: TF.autocontrast(pixels),
    "equalize": lambda pixels, _: TF.equalize(pixels),
    "brightness": lambda pixels, _: TF.adjust_brightness(pixels, ENHANCE),
    "sharpness": lambda pixels, _: TF.adjust_sharpness(pixels, ENHANCE),
    "shear_x": lambda pixels, sign: _move(pixels, shear=(sign * SHEAR, 0.0)),
    "shear_y": lambda pixels, sign: _move(pixels, shear=(0.0, sign * SHEAR)),
    "shift_x": lambda pixels, sign: _move(pixels, shift=(sign * SHIFT, 0.0)),
    "shift_y": lambda pixels, sign: _move(pixels, shift=(0.0, sign * SHIFT)),
    "rotate": lambda pixels, sign: TF.rotate(pixels, sign * ROTATION, InterpolationMode.BILINEAR, fill=GREY),
}


def rand_augment(pixels: Pixels, rng: np.random.Generator, *, operations: int) -> Pixels:
    """Draw that many of the operations, with repetition, and carry out each with probability 1/2."""
    names = list(OPERATIONS)
    for which in rng.integers(len(names), size=operations):
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < 0.5:
            pixels = OPERATIONS[names[which]](pixels, sign)
    return pixels
