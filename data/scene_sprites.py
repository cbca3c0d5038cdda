"""Pictures of a bank made ready to be pasted: cut to their visible part, with their colour's name if it is clear."""

import colorsys
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

import numpy as np
from bank_format import Bank
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw
from scene_kinds import SPLITS, Kind, Vocabulary, build_vocabulary

PHOTOGRAPHS = "food-photographs"  # the group of the bank's concepts that are shown by photographs
SOLID = 96  # alpha from which it encloses what lies behind
VISIBLE = 24  # alpha from which a pixel counts as part of the drawing
CLEAR_SHARE = 0.7  # of the drawing's pixels, outline aside, that one colour must hold to be its colour
OUTLINE_SHARE = 0.2  # at most this share of black pixels is taken for outline

# name, hue from, to (degrees), saturation from, to, value from, to; what lies between two boxes has no clear name
_COLORS = (
    ("red", 345, 372, 0.55, 1.0, 0.5, 1.0),
    ("orange", 18, 33, 0.7, 1.0, 0.85, 1.0),
    ("yellow", 44, 64, 0.35, 1.0, 0.8, 1.0),
    ("green", 75, 170, 0.25, 1.0, 0.25, 1.0),
    ("blue", 188, 250, 0.4, 1.0, 0.35, 1.0),
    ("purple", 258, 300, 0.2, 1.0, 0.45, 1.0),
    ("pink", 308, 372, 0.15, 0.52, 0.75, 1.0),
    ("brown", 8, 42, 0.3, 1.0, 0.2, 0.68),
    ("black", 0, 360, 0.0, 1.0, 0.0, 0.25),
    ("white", 0, 360, 0.0, 0.12, 0.88, 1.0),
    ("gray", 0, 360, 0.0, 0.16, 0.35, 0.78),
)
COLOR_NAMES = tuple(name for name, *_ in _COLORS)


@dataclass(frozen=True, eq=False)
class World:
    """Everything that scenes are drawn from."""

    bank: Bank
    vocabulary: Vocabulary
    _images: dict[int, Image.Image] = field(default_factory=dict)
    _solids: dict[int, Image.Image] = field(default_factory=dict)
    _colors: dict[int, str | None] = field(default_factory=dict)
    _pools: dict[str, list[Kind]] = field(default_factory=dict)
    _kin: dict[tuple[str, str], list[Kind]] = field(default_factory=dict)
    _photographs: dict[str, list[int]] = field(default_factory=dict)

    def image(self, picture: int) -> Image.Image:
        """A picture cut to its visible part, with premultiplied alpha (mode RGBa)."""
        if picture not in self._images:
            whole = self.bank.pictures[picture].image()
            self._images[picture] = whole.crop(visible_box(whole.getchannel("A"))).convert("RGBa")
        return self._images[picture]

    def solid(self, picture: int) -> Image.Image:
        """What a picture covers when all that its lines enclose is filled (mode L)."""
        if picture not in self._solids:
            alpha = self.image(picture).getchannel("a")
            drawn = Image.new("L", (alpha.width + 2, alpha.height + 2))
            drawn.paste(alpha.point([0] * SOLID + [255] * (256 - SOLID)), (1, 1))
            ImageDraw.floodfill(drawn, (0, 0), 128)
            inside = drawn.point([255] * 128 + [0] + [255] * 127).crop((1, 1, alpha.width + 1, alpha.height + 1))
            self._solids[picture] = ImageChops.lighter(alpha, inside)
        return self._solids[picture]

    def color(self, picture: int) -> str | None:
        """The English name of a picture's colour; None when it has several, or one between two names."""
        if picture not in self._colors:
            self._colors[picture] = color_name(self.image(picture).convert("RGBA"))
        return self._colors[picture]

    def pool(self, split: str) -> list[Kind]:
        if split not in self._pools:
            self._pools[split] = self.vocabulary.pool(split)
        return self._pools[split]

    @cached_property
    def new_concepts(self) -> list[Kind]:
        return self.vocabulary.new_concepts()

    def kin(self, split: str, kin: str) -> list[Kind]:
        """The kinds of a split's pool with the same `kin`."""
        if (split, kin) not in self._kin:
            self._kin[split, kin] = [kind for kind in self.pool(split) if kind.kin == kin]
        return self._kin[split, kin]

    def photographs(self, split: str) -> list[int]:
        """The photographs that a split's backgrounds are cut from: each is of one split, by the hash of its bytes."""
        if not self._photographs:
            self._photographs.update({name: [] for name in SPLITS})
            for index, picture in enumerate(self.bank.pictures):
                if self.bank.concepts[picture.concept].group == PHOTOGRAPHS:
                    self._photographs[_split_of(picture.png)].append(index)
        return self._photographs[split]

    @cached_property
    def color_shares(self) -> dict[str, float]:
        """How common each clear colour is among the pictures that are trained on."""
        known = (index for kind in self.pool("train") for index in kind.known)
        found = Counter(name for index in known if (name := self.color(index)))
        return {name: count / found.total() for name, count in sorted(found.items())}


def build_world(bank: Bank, kinds: int | None = None, styles: int | None = None) -> World:
    """All kinds of a bank in all its styles, or so many of them."""
    return World(bank, build_vocabulary(bank, kinds, styles))


def visible_box(alpha: Image.Image) -> tuple[int, int, int, int] | None:
    """The box of a drawing's visible part (left, top, right, bottom); None where nothing is visible."""
    return alpha.point([0] * VISIBLE + [255] * (256 - VISIBLE)).getbbox()


def color_name(picture: Image.Image) -> str | None:
    """The colour of an RGBA picture when one name covers it, else None."""
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float32).reshape(-1, 4) / np.float32(255)
    rgb = pixels[pixels[:, 3] > 0.6, :3]
    if len(rgb) < 40:
        return None
    names = _pixel_colors(rgb)
    counts = np.bincount(names, minlength=len(_COLORS) + 1)[:-1]
    black = [name for name, *_ in _COLORS].index("black")
    outline = min(counts[black], OUTLINE_SHARE * len(rgb))
    best = int(counts.argmax())
    share = counts[best] / (len(rgb) - (0 if best == black else outline))
    return _COLORS[best][0] if share >= CLEAR_SHARE else None


def color_named(name: str, rng: Random) -> NDArray[np.float32]:
    """A colour that `color_name` calls so, with its neighbours: red, green and blue, 0 to 255."""
    index = COLOR_NAMES.index(name)
    _, *limits = _COLORS[index]
    while True:
        hue, saturation, value = (
            low + rng.uniform(0.1, 0.9) * (high - low) for low, high in zip(limits[::2], limits[1::2], strict=True)
        )
        rgb = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
        if _pixel_colors(np.array([rgb], np.float32))[0] == index:
            return 255 * np.array(rgb, np.float32)


def _pixel_colors(rgb: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index into _COLORS of each pixel; len(_COLORS) where the colour has no clear name."""
    value = rgb.max(1)
    chroma = value - rgb.min(1)
    red, green, blue = rgb.T
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = np.where(chroma > 0, hue * 60, 0)
    saturation = chroma / np.maximum(value, 1e-6)
    found = np.full(len(rgb), len(_COLORS))
    for index, (_, hue_from, hue_to, low_s, high_s, low_v, high_v) in reversed(list(enumerate(_COLORS))):
        inside = ((hue >= hue_from) & (hue <= hue_to)) | ((hue + 360 >= hue_from) & (hue + 360 <= hue_to))
        inside &= (saturation >= low_s) & (saturation <= high_s) & (value >= low_v) & (value <= high_v)
        found[inside] = index
    return found


def _split_of(content: bytes) -> str:
    """Train for six photographs in ten, else one of the other splits."""
    draw = int.from_bytes(hashlib.sha256(content).digest()[:8]) % 100
    return SPLITS[0] if draw < 60 else SPLITS[1 + (draw - 60) // 8]
