"""One record of a shard: its bytes -> picture, texts and metadata; and what happens when they are broken."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from vlmoe.data.decode import Pixels, decode_plain
from vlmoe.errors import UserError

Part = Literal["image", "text"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of members of a shard
FILE_EXTENSIONS = (*IMAGE_EXTENSIONS, "gif", "bmp")  # of picture files in a folder
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # by content: files on the web carry wrong extensions
MAX_PIXELS = 64_000_000  # of one picture; more is taken for a decompression bomb
NEEDS: dict[str, tuple[Part, ...]] = {"images": ("image",), "texts": ("text",), "pairs": ("image", "text")}  # of shards
MIN_SEEN = 100  # samples read before a share of broken ones means something
NAMES_KEPT = 5  # broken samples that an error names


class BrokenSample(Exception):  # noqa: N818 - the glossary's word
    """A sample that cannot be used; `cause` is a short phrase that failures are counted by."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class BadSample(NamedTuple):
    """The record of a broken sample."""

    stream: str
    cause: str
    shard: str
    key: str


@dataclass(frozen=True)
class Sample:
    key: str
    source: str  # path of its shard
    image: Pixels | None  # uint8 [3, height, width], RGB; None in a stream without pictures
    texts: list[str]  # at least one in a stream that needs text, else empty
    meta: dict[str, Any]  # of `key.json`, or of the row of an index file
    image_b: Pixels | None = None  # the second picture of a pair (NLVR2)


class SamplePlace(Protocol):
    """Where a sample lies."""

    @property
    def shard(self) -> str:
        """Path of the file that names it."""
        ...

    @property
    def key(self) -> str: ...

    def load(self) -> Sample:
        """Read and decode it; raises BrokenSample."""
        ...


class SampleStream(Protocol):
    """An endless order of samples: what is at a position is a pure function of the recipe."""

    batch_size: int

    def read(self, position: int, prepare: Callable[[Sample], Any]) -> tuple[Any, list[BadSample]]:
        """The sample of a position as `prepare` returns it, and the broken ones that were met on the way to it."""
        ...


def extensions_of(needs: Iterable[Part]) -> frozenset[str]:
    """The members that a stream with these needs reads."""
    named = {"image": IMAGE_EXTENSIONS, "text": ("txt",)}
    return frozenset({"json"}.union(*(named[part] for part in needs)))


def decode_sample(members: Mapping[str, bytes], *, key: str, source: str, needs: Iterable[Part]) -> Sample:
    """Make a sample of the bytes of its members, by extension. Only what the stream needs is decoded.

    Raises:
        BrokenSample: with cause 'no image', 'image too large', 'truncated image', 'undecodable image', 'bad json',
            'no text', 'empty text' or 'bad text encoding'.
    """
    meta = _decode_json(members["json"]) if "json" in members else {}
    texts = _decode_texts(members.get("txt"), meta) if "text" in needs else []
    image = None
    if "image" in needs:
        found = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
        if not found:
            raise BrokenSample("no image")
        image = decode_image(found[0])
    return Sample(key=key, source=source, image=image, texts=texts, meta=meta)


def decode_image(content: bytes) -> Pixels:
    """JPEG, PNG, WebP, GIF or BMP -> RGB: first frame, upright by its EXIF orientation, on white where transparent.

    Raises:
        BrokenSample: with cause 'image too large', 'truncated image' or 'undecodable image'.
    """
    pixels = decode_plain(content, max_pixels=MAX_PIXELS)
    return to_pixels(decode_with_pillow(content)) if pixels is None else pixels


def to_pixels(image: Image.Image) -> Pixels:
    """An RGB picture as a tensor, with the colours of a pixel side by side in memory, as every decoder leaves them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode_with_pillow(content: bytes) -> Image.Image:
    """`decode_image` of every kind of picture: the slow twin of `vlmoe.data.decode`, and what says why one is broken."""
    try:
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BrokenSample("image too large")
        return to_rgb(image)
    except BrokenSample:
        raise
    except Image.DecompressionBombError:
        raise BrokenSample("image too large") from None
    except Exception as error:  # each of Pillow's formats has its own family of errors
        cut = "truncated" in str(error).lower()
        raise BrokenSample("truncated image" if cut else "undecodable image") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, on white where transparent, 8 bits a colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _decode_json(content: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError):
        raise BrokenSample("bad json") from None
    captions = meta.get("captions", []) if isinstance(meta, dict) else None
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BrokenSample("bad json")
    return meta


def _decode_texts(txt: bytes | None, meta: dict[str, Any]) -> list[str]:
    """The caption of `key.txt`, then those of the json; blank and repeated ones are left out."""
    if txt is None and "captions" not in meta:
        raise BrokenSample("no text")
    try:
        said = [] if txt is None else [txt.decode("utf-8-sig")]
        said += meta.get("captions", [])
        "".join(said).encode()  # json can hold half a surrogate pair, which no tokenizer takes
    except UnicodeError:
        raise BrokenSample("bad text encoding") from None
    texts = list(dict.fromkeys(text.strip() for text in said if text.strip()))
    if not texts:
        raise BrokenSample("empty text")
    return texts


@dataclass
class BadSampleCounter:
    """Broken samples of a run, by cause. Its state belongs in the checkpoint."""

    max_bad_fraction: float
    seen: int = 0  # samples read, broken ones included
    causes: Counter[str] = field(default_factory=Counter)
    first: list[BadSample] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.causes.total()

    def add(self, bad: Iterable[BadSample], *, seen: int) -> None:
        """Count `seen` samples read, of which these were broken.

        Raises:
            UserError: more than `max_bad_fraction` of at least 100 samples, or all of them, are broken.
        """
        bad = list(bad)
        self.seen += seen
        self.causes.update(each.cause for each in bad)
        self.first = [*self.first, *bad][:NAMES_KEPT]
        if self.bad > self.max_bad_fraction * self.seen and (self.seen >= MIN_SEEN or self.bad == self.seen):
            raise UserError(
                f"{self.bad} of {self.seen} samples are broken, more than data.max_bad_fraction = "
                f"{self.max_bad_fraction:g} allows ({self.summary()}): mend the shards or raise it"
            )

    def summary(self) -> str:
        """`truncated image 3, bad json 1; first: a.tar key 7 (bad json), ...`, or an empty string."""
        counts = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common())
        names = ", ".join(f"{each.shard} key {each.key} ({each.cause})" for each in self.first)
        return f"{counts}; first: {names}" if self.first else ""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "causes": dict(self.causes), "first": [list(each) for each in self.first]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.causes, self.first = 0, Counter(), []
        self.merge(state)

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add the counts of another one's `state_dict`."""
        self.seen += state["seen"]
        self.causes.update(state["causes"])
        self.first = [*self.first, *(BadSample(*each) for each in state["first"])][:NAMES_KEPT]
