"""Scenes as pictures: a background, then every thing of the layout, pasted back to front with a soft shadow.

Arrays are [height, width, channel], float32 in 0..255 while composing.
"""

import io
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scene_layout import LayoutOptions, Scene, Thing
from scene_restyle import TURN, color_in, restyle, turned
from scene_sprites import World, color_named

Pixels = NDArray[np.float32]

CONTRAST = 45.0  # smallest distance, in grey levels, between a thing's mean colour and the background behind it
BACKGROUNDS = 4  # how many are tried for enough contrast
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Background:
    pixels: Pixels
    about: str  # "gradient", "noise", "photograph" or "plain"
    picture: int | None  # which picture of the bank it is a crop of


def render(world: World, scene: Scene, rng: Random, options: LayoutOptions) -> tuple[Image.Image, Background]:
    """A scene as an RGB picture, and the background it was given: the first that all things stand out from, or white."""
    sprites = [_sprite(world, thing) for thing in scene.things]
    if options.restyled and scene.split == "train":
        lots = Random(str([(thing.picture, thing.box) for thing in scene.things]))
        sprites = [
            _restyled(world, thing, sprite, lots, options.restyled)
            for thing, sprite in zip(scene.things, sprites, strict=True)
        ]
    best, best_contrast = None, -1.0
    for _ in range(1 if options.plain else BACKGROUNDS):
        background = _white(scene.size) if options.plain else draw_background(world, scene.split, scene.size, rng)
        contrast = min(
            _contrast(background.pixels, thing, sprite) for thing, sprite in zip(scene.things, sprites, strict=True)
        )
        if contrast > best_contrast:
            best, best_contrast = background, contrast
        if contrast >= CONTRAST:
            break
    assert best is not None
    canvas = best.pixels.copy()
    for thing, sprite in zip(scene.things, sprites, strict=True):
        _shade(canvas, thing, sprite)
        left, top, width, height = thing.box
        behind = canvas[top : top + height, left : left + width]
        behind *= 1 - sprite[..., 3:] / 255
        behind += sprite[..., :3]
    return Image.fromarray(canvas.clip(0, 255).round().astype(np.uint8)), best


def encode(image: Image.Image) -> bytes:
    """JPEG without chroma subsampling: thin coloured outlines stay sharp."""
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return packed.getvalue()


def draw_background(world: World, split: str, size: int, rng: Random) -> Background:
    """A gradient, soft noise, or a blurred and lightened crop of one of the split's photographs."""
    photographs = world.photographs(split)
    about = rng.choices(("gradient", "noise", "photograph"), (45, 25, 30 if photographs else 0))[0]
    if about == "gradient":
        return Background(_gradient(size, rng), about, None)
    if about == "noise":
        return Background(_noise(size, rng), about, None)
    picture = rng.choice(photographs)
    return Background(_photograph(world, picture, size, rng), about, picture)


def _white(size: int) -> Background:
    return Background(np.full((size, size, 3), 250, np.float32), "plain", None)


def _sprite(world: World, thing: Thing) -> Pixels:
    """A thing's picture at its size, premultiplied RGBA."""
    image = world.image(thing.picture).resize(thing.box[2:], Image.Resampling.BICUBIC, reducing_gap=2.0)
    pixels = np.asarray(image, np.float32)
    return pixels[:, ::-1] if thing.flipped else pixels


def _restyled(world: World, thing: Thing, sprite: Pixels, rng: Random, share: float) -> Pixels:
    """In a style of its own, for a share of drawings; icons always, for they are bare lines."""
    if world.bank.pictures[thing.picture].is_icon:
        solid = np.asarray(world.solid(thing.picture).resize(thing.box[2:], reducing_gap=2.0), np.float32)
        shades = (color_named(thing.color, rng), color_named(thing.color, rng)) if thing.color else None
        sprite = color_in(sprite, solid[:, ::-1] if thing.flipped else solid, rng, shades)
        if shades is not None:  # more lines would hide them
            return turned(sprite, rng.uniform(-TURN, TURN))
    elif rng.random() >= share:
        return sprite
    return restyle(sprite, rng, keep_color=thing.color is not None)


def _contrast(background: Pixels, thing: Thing, sprite: Pixels) -> float:
    left, top, width, height = thing.box
    alpha = sprite[..., 3].sum() / 255
    mean = sprite[..., :3].sum((0, 1)) / max(alpha, 1.0)
    return float(np.abs(mean - background[top : top + height, left : left + width].mean((0, 1))).max())


def _shade(canvas: Pixels, thing: Thing, sprite: Pixels) -> None:
    """A soft dark rim below a thing, so that a pale one shows on a pale background."""
    reach = max(canvas.shape[0] // 48, 2)
    left, top, width, height = thing.box
    solid = Image.fromarray(sprite[..., 3].clip(0, 255).astype(np.uint8))
    padded = Image.new("L", (width + 2 * reach, height + 2 * reach))
    padded.paste(solid, (reach, reach))
    soft = np.asarray(padded.filter(ImageFilter.BoxBlur(reach / 2)), np.float32) / 255
    x, y = left - reach, top - reach + reach // 2
    x0, y0 = max(x, 0), max(y, 0)
    part = soft[y0 - y :, x0 - x :][: canvas.shape[0] - y0, : canvas.shape[1] - x0]
    canvas[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] *= 1 - 0.3 * part[..., None]


def _tint(rng: Random) -> Pixels:
    """A colour for a background: mostly pale, at times deep."""
    deep = rng.random() < 0.25
    base = rng.uniform(40, 120) if deep else rng.uniform(190, 245)
    return np.array([min(max(base + rng.uniform(-45, 45), 0), 255) for _ in range(3)], np.float32)


def _gradient(size: int, rng: Random) -> Pixels:
    """From one tint to another, along a line or from a point outwards."""
    start, end = _tint(rng), _tint(rng)
    end = start + 0.6 * (end - start)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    if rng.random() < 0.7:
        angle = rng.uniform(0, 2 * np.pi)
        way = x * np.cos(angle) + y * np.sin(angle)
    else:
        way = np.hypot(x - rng.random(), y - rng.random())
    way = (way - way.min()) / (way.max() - way.min())
    return (start + way[..., None] * (end - start)).astype(np.float32)


def _noise(size: int, rng: Random) -> Pixels:
    """Clouds of a tint: a coarse grid of random colours, drawn large."""
    numbers = np.random.default_rng(rng.getrandbits(64))
    cells = rng.randint(3, 9)
    grid = _tint(rng) + numbers.normal(0, rng.uniform(8, 26), (cells, cells, 3))
    coarse = Image.fromarray(grid.clip(0, 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)


def _photograph(world: World, picture: int, size: int, rng: Random) -> Pixels:
    image = world.image(picture).convert("RGB")
    side = round(min(image.size) * rng.uniform(0.4, 0.9))
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    crop = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    soft = np.asarray(crop.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.015, 0.05))), np.float32)
    light = rng.uniform(0.35, 0.65)
    return soft * (1 - light) + 250 * light
