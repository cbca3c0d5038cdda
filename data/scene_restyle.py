"""Drawings in styles that nobody drew: outlines, flat colours, line drawings, other tints and angles, by lot.

A bank has fewer than ten drawings of a kind, and a model that sees little else learns them by heart. Restyled ones teach it
shapes (domain randomisation: Tobin et al. 2017, arXiv:1703.06907). A drawing whose colour has a name keeps that colour.

Arrays are [height, width, channel] in 0..255: sprites with premultiplied alpha, colours without.
"""

from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scene_sprites import visible_box

Pixels = NDArray[np.floating]

TURN = 20.0  # degrees, at most
FILLING = 0.65  # share of an icon that lies between its lines, from which its colour is that of the inside
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def restyle(sprite: Pixels, rng: Random, *, keep_color: bool) -> NDArray[np.float32]:
    """A drawing of the same size in a style of its own; with `keep_color`, its colours change in brightness only."""
    if rng.random() < 0.5:
        sprite = turned(sprite, rng.uniform(-TURN, TURN))
    alpha = sprite[..., 3:] / 255
    color = sprite[..., :3] / np.maximum(alpha, 1 / 255)
    lines = None
    if rng.random() < 0.85:
        lines = _lines(color, alpha, inner=rng.random() < 0.6, reach=round(max(sprite.shape) * rng.uniform(0, 0.04)))
    if rng.random() < 0.4:
        color = _flat(color, levels=4 if keep_color else rng.randint(2, 4))
    if not keep_color:
        color = _tinted(color, rng)
        if lines is not None and rng.random() < 0.25:  # a line drawing
            color = color + (255 - color) * rng.uniform(0.6, 1.0)
    color = color * rng.uniform(0.85, 1.1)
    if lines is not None:
        ink = _some_color(rng, 0, 60)
        color = color + (ink - color) * lines
    return np.concatenate([color.clip(0, 255) * alpha, 255 * alpha], axis=2).astype(np.float32)


def color_in(
    icon: Pixels, solid: Pixels, rng: Random, shades: tuple[Pixels, Pixels] | None = None
) -> NDArray[np.float32]:
    """An icon with ink of some colour and, by lot, filled with another. `solid` [height, width]: what it covers when it is
    filled. With `shades` [3] of one colour the darker is its ink and the other the rest, or that is between dark lines,
    where most of it is."""
    ink, inside = icon[..., 3:] / 255, (solid[..., None] - icon[..., 3:]).clip(0, 255) / 255
    if shades is None:
        line = _some_color(rng, 0, 70) if rng.random() < 0.6 else _some_color(rng, 0, 255)
        fill = _some_color(rng, 60, 255) if rng.random() < 0.75 else np.full(3, 255, np.float32)
        inside = inside * (rng.random() < 0.7)
    else:
        is_filling = inside.sum() > FILLING * (inside.sum() + ink.sum())
        line, fill = sorted(shades, key=lambda shade: shade @ LUMA)
        line = _some_color(rng, 0, 60) if is_filling and rng.random() < 0.8 else line
    return np.concatenate([line * ink + fill * inside, 255 * (ink + inside)], axis=2).astype(np.float32)


def _some_color(rng: Random, low: float, high: float) -> NDArray[np.float32]:
    return np.array([rng.uniform(low, high) for _ in range(3)], np.float32)


def turned(sprite: Pixels, degrees: float) -> Pixels:
    """Turned, then fitted to its size again by its visible part."""
    height, width = sprite.shape[:2]
    image = Image.fromarray(sprite.clip(0, 255).round().astype(np.uint8), "RGBa")
    turned = image.rotate(degrees, Image.Resampling.BILINEAR, expand=True)
    box = visible_box(turned.getchannel("a"))
    return np.asarray(turned.resize((width, height), Image.Resampling.BICUBIC, box=box), np.float32)


def _lines(color: Pixels, alpha: Pixels, *, inner: bool, reach: int) -> Pixels:
    """Where ink goes, 0 to 1: the rim of the drawing and, with `inner`, the edges between its colours; so many pixels to
    either side of them as well."""
    solid = Image.fromarray((255 * alpha[..., 0]).clip(0, 255).astype(np.uint8))
    padded = Image.new("L", (solid.width + 4, solid.height + 4))
    padded.paste(solid, (2, 2))
    core = np.asarray(padded.filter(ImageFilter.MinFilter(3)), np.float32)[2:-2, 2:-2] / 255
    lines = (alpha[..., 0] - core).clip(0, 1)
    if inner:
        down, across = np.gradient(color @ LUMA)
        lines = np.maximum(lines, (np.hypot(down, across) / 40 - 0.5).clip(0, 1))
    if reach:  # a filter of one pixel ends the process in Pillow 12
        thick = Image.fromarray((255 * lines).round().astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * reach + 1))
        lines = np.asarray(thick, np.float32) / 255
    return lines[..., None]


def _flat(color: Pixels, *, levels: int) -> Pixels:
    """Fewer shades, as flat drawings have them."""
    step = 255 / levels
    return (color / step).round() * step


def _tinted(color: Pixels, rng: Random) -> Pixels:
    """More or less saturated, and the colours turned a little around the axis of greys."""
    angle = rng.uniform(-0.6, 0.6)
    c, s = np.cos(angle), np.sin(angle)
    third, root = (1 - c) / 3, s / np.sqrt(3)
    turn = np.array(
        [
            [c + third, third - root, third + root],
            [third + root, c + third, third - root],
            [third - root, third + root, c + third],
        ],
        np.float32,
    )
    grey = (color @ LUMA)[..., None]
    return grey + (color @ turn.T - grey) * rng.uniform(0.0, 1.2)
