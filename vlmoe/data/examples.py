"""Labelled examples of index files, their pictures in folders or shards, and the order that training reads them in.

The order law. An epoch is a permutation of the examples, a pure function of (seed, epoch) and of their number; positions
count on over epochs: epoch = position // number of examples.
"""

import gc
import marshal
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from vlmoe.config import ExamplesSource
from vlmoe.data.index import ShardIndex
from vlmoe.data.readers import Example, parts_of, read_examples
from vlmoe.data.sample import BadSample, BrokenSample, Sample, decode_image
from vlmoe.data.shards import open_shards, permutation, read_or_replace
from vlmoe.data.text import is_unicode
from vlmoe.errors import UserError

STREAM = "examples"
FORMAT_OF = {"annotations": "vqa", "image_name": "vqa", "splits": "karpathy"}  # which alone reads this setting


class Pictures(Protocol):
    """Where the pictures of a source lie."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """Raises BrokenSample where there is no such picture."""
        ...

    def path(self, name: str) -> str:
        """Where it lies: one path, one picture, whatever a recipe calls its folder or its shards."""
        ...


@dataclass(frozen=True)
class FolderPictures:
    root: Path

    def has(self, name: str) -> bool:
        try:
            return (self.root / name).is_file()
        except (OSError, ValueError):  # no file can have such a name
            return False

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except (OSError, ValueError):
            raise BrokenSample("missing image") from None

    def path(self, name: str) -> str:
        return os.path.normpath(os.path.join(os.path.realpath(self.root), name))


@dataclass(frozen=True)
class ShardPictures:
    """`a/b.left.jpg` is the member `left.jpg` of the sample with key `b`; folders in names and keys do not count."""

    shards: list[ShardIndex]
    places: dict[str, tuple[int, int]]  # key -> shard, sample

    def has(self, name: str) -> bool:
        key, _, extension = name.rpartition("/")[2].partition(".")
        if key not in self.places:
            return False
        shard, sample = self.places[key]
        return extension.lower() in self.shards[shard].members(sample)

    def read(self, name: str) -> bytes:
        if not self.has(name):
            raise BrokenSample("missing image")
        key, _, extension = name.rpartition("/")[2].partition(".")
        shard, sample = self.places[key]
        return self.shards[shard].read(sample, frozenset({extension.lower()}))[extension.lower()]

    def path(self, name: str) -> str:
        name = name.rpartition("/")[2]
        shard, _ = self.places.get(name.partition(".")[0], (0, 0))  # a picture that is missing is never read
        return f"{os.path.realpath(self.shards[shard].path)}/{name}"


@dataclass(frozen=True)
class Examples:
    """The examples of one split. They are packed: half a million are three arrays, which worker processes share.

    `marshal` reads a row in a tenth of the time of `json`; what it packs here never leaves the program.
    """

    sources: tuple[ExamplesSource, ...]
    pictures: tuple[Pictures, ...]  # of each source
    packed: bytes  # one after the other
    ends: Int[np.ndarray, " rows"]  # where each ends in `packed`
    chosen: Int[np.ndarray, " examples"]  # rows, in order; the others are in no `part`

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> Example:
        return self._row(int(self.chosen[number]))[1]

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))

    def whole(self) -> Iterator[Example]:
        """Every row of the index files, also those outside the sources' `part`."""
        return (self._row(row)[1] for row in range(len(self.ends)))

    def where(self, keep: Callable[[Example], bool]) -> "Examples":
        """Those that `keep` is true of."""
        return replace(self, chosen=self.chosen[[keep(example) for example in self]])

    def place(self, number: int) -> "ExamplePlace":
        return ExamplePlace(self, number)

    def pictures_of(self) -> dict[tuple[str, str], tuple[int, str]]:
        """Every picture once: (folder or shards, name) -> (source, the first row that names it)."""
        found: dict[tuple[str, str], tuple[int, str]] = {}
        for row in self.chosen:
            source, example = self._row(int(row))
            there = _place_of_pictures(self.sources[source])
            for name in example.images:
                found.setdefault((there, name), (source, example.where))
        return found

    def check_pictures(self, *, decode: bool = False, max_missing: float = 0.0) -> None:
        """Raises UserError for the first row whose picture is missing or, with `decode`, cannot be decoded.

        Up to a share of `max_missing` of the pictures may be missing.
        """
        pictures = self.pictures_of()
        missing = [
            f"{where}: there is no picture {name!r} in {there}"
            for (there, name), (source, where) in pictures.items()
            if not self.pictures[source].has(name)
        ]
        if len(missing) > max_missing * len(pictures):
            raise UserError(missing[0] + (f" ({len(missing)} are missing)" if len(missing) > 1 else ""))
        if decode:
            with ThreadPoolExecutor() as threads:
                causes = threads.map(self._cause, pictures.items())
                for (there, name), where, cause in tqdm(causes, total=len(pictures), desc="decoding", delay=2):
                    if cause:
                        raise UserError(f"{where}: picture {name!r} in {there} is broken ({cause})")

    def load(self, number: int) -> Sample:
        source, example = self._row(int(self.chosen[number]))
        images = [decode_image(self.pictures[source].read(name)) for name in example.images]
        return Sample(
            key=str(example.id),
            source=example.where,
            image=images[0],
            texts=list(example.texts),
            meta={**example.meta, "id": example.id},
            image_b=images[1] if len(images) > 1 else None,
        )

    def _cause(self, picture: tuple[tuple[str, str], tuple[int, str]]) -> tuple[tuple[str, str], str, str | None]:
        """(picture, row, what is wrong with it)"""
        key, (source, where) = picture
        try:
            decode_image(self.pictures[source].read(key[1]))
        except BrokenSample as error:
            return key, where, error.cause
        return key, where, None

    def _row(self, row: int) -> tuple[int, Example]:
        source, *example = marshal.loads(self.packed[self.ends[row - 1] if row else 0 : self.ends[row]])
        return source, Example(*example)


@dataclass(frozen=True)
class ExamplePlace:
    examples: Examples
    number: int

    @property
    def shard(self) -> str:
        return self.examples[self.number].where

    @property
    def key(self) -> str:
        return str(self.examples[self.number].id)

    def load(self) -> Sample:
        return self.examples.load(self.number)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Reading makes millions of objects and no cycle; Python's collector would go over all of them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def open_examples(sources: Sequence[ExamplesSource], *, recipe_key: str) -> Examples:
    """Read the index files of one split.

    Raises:
        UserError: there is no example, a setting does nothing here, a file is missing or broken, a row is wrong, or an id
            comes twice; the line names the row.
    """
    if not sources:
        raise UserError(f"{recipe_key} is empty: name an index file")
    rows: list[bytes] = []
    chosen: list[int] = []
    seen: set[int | str] = set()
    pictures: list[Pictures] = []
    named: dict[int | str, tuple[int, str]] = {}
    for number, source in enumerate(sources):
        key = f"{recipe_key}[{number}]"
        _check_settings(source, key)
        pictures.append(_open_pictures(source, key))
        first, part, found = len(rows), [], []
        for example in read_examples(source):
            if example.id in seen:
                raise UserError(f"{example.where}: id {example.id!r} comes twice in {recipe_key}")
            seen.add(example.id)
            _check_text(example)
            _tell_apart(example, number, named, pictures)
            row = (number, example.id, example.images, example.where, example.texts, example.meta)
            rows.append(marshal.dumps(row))
            if source.part != "all":
                found.append(replace(example, texts=(), meta={}))
        if source.part == "all":
            part = range(first, len(rows))
        else:
            parts = parts_of(found, source.held_out_images)
            part = [first + place for place, each in enumerate(parts) if each == source.part]
        chosen += part
        if not part:
            raise UserError(f"{key}: {source.index} holds no example" + (f" in part {source.part!r}" if found else ""))
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return Examples(tuple(sources), tuple(pictures), b"".join(rows), ends, np.array(chosen, dtype=np.int64))


class ExampleStream:
    """An endless, seeded order over examples; read as `vlmoe.data.shards.Stream` is.

    Raises:
        UserError: there is no example.
    """

    def __init__(self, examples: Examples, *, batch_size: int, seed: int) -> None:
        if not len(examples):
            raise UserError("data.examples.sources: no example is left to train on")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._memo: tuple[int, Int[np.ndarray, " examples"]] | None = None

    def locate(self, position: int, attempt: int = 0) -> ExamplePlace:
        """The example at a position, or (attempt > 0) one of those that may stand in for it."""
        epoch, place = divmod(position, len(self.examples))
        if self._memo is None or self._memo[0] != epoch:
            self._memo = epoch, permutation(len(self.examples), self.seed, STREAM, epoch)
        order = self._memo[1]
        return self.examples.place(int(order[(place + attempt) % len(order)]))

    def read(self, position: int, prepare: Callable[[Sample], Any]) -> tuple[Any, list[BadSample]]:
        """The example of a position as `prepare` returns it, and the broken ones that were met on the way to it.

        Raises:
            UserError: the example and the eight that were tried in its place are all broken.
        """
        return read_or_replace(STREAM, partial(self.locate, position), prepare, hint="vlmoe check-data RECIPE names it")


def _check_settings(source: ExamplesSource, recipe_key: str) -> None:
    for name, its in FORMAT_OF.items():
        if getattr(source, name) and source.format != its:
            raise UserError(
                f"{recipe_key}.{name} is read by format {its} alone, and this is format {source.format}: remove it"
            )
    if source.part != "all" and not source.held_out_images:
        raise UserError(
            f"{recipe_key}: part {source.part!r} needs held_out_images, the number of pictures that are set aside"
        )
    if source.part == "all" and source.held_out_images:
        raise UserError(f"{recipe_key}: held_out_images sets nothing aside in part 'all': set part to rest or held_out")


def _tell_apart(
    example: Example, source: int, named: dict[int | str, tuple[int, str]], pictures: Sequence[Pictures]
) -> None:
    """Give a picture its path for an `image_id` where another one has that id already: two folders may hold a 0000.jpg."""
    if "image_id" in example.meta:
        own = source, example.images[0]
        other = named.setdefault(example.meta["image_id"], own)
        if own != other:
            path, taken = (pictures[place].path(name) for place, name in (own, other))
            if path != taken:
                example.meta["image_id"] = path


def _check_text(example: Example) -> None:
    meta = example.meta
    if not is_unicode("".join((*example.texts, *meta.get("answers", ()), meta.get("label", "")))):
        raise UserError(f"{example.where}: its text is not valid Unicode")


def _place_of_pictures(source: ExamplesSource) -> str:
    index = Path(source.index)
    return source.images or str(index if source.format == "folders" else index.parent)


def _open_pictures(source: ExamplesSource, recipe_key: str) -> Pictures:
    place = _place_of_pictures(source)
    if not place.endswith(".tar"):
        if source.images and not Path(place).is_dir():  # else the index file is missing too
            raise UserError(f"{recipe_key}.images: {place} is no folder; name one, or shards (*.tar)")
        return FolderPictures(Path(place))
    shards = open_shards(place, recipe_key=f"{recipe_key}.images")
    places: dict[str, tuple[int, int]] = {}
    for shard, index in enumerate(shards):
        for sample, key in enumerate(index.keys):
            name = key.rpartition("/")[2]
            if name in places:
                other = shards[places[name][0]].path
                raise UserError(
                    f"{recipe_key}.images: {other} and {index.path} both have {name!r}; name only one of them"
                )
            places[name] = shard, sample
    return ShardPictures(shards, places)
