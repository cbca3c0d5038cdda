"""Shards and the order in which a stream visits their samples.

The order law. An epoch of a stream draws round(samples * upsampling) samples of every source: whole passes, and a
random subset for the rest. The visits to shards of all sources are permuted and cut into groups of `shuffle_shards`
visits; the samples of a group are permuted together. Positions count on over epochs: epoch = position // epoch_length.
All of it is a pure function of (seed, stream name, epoch, position) and of the lengths of the shards, and uses only the
raw bits of PCG64, which NumPy keeps stable over versions.

Axes: visits (a shard in an epoch, whole or in part), draws (samples of one group of visits).
"""

import glob
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int
from webdataset.shardlists import expand_urls

from vlmoe.config import DataConfig, SourceConfig
from vlmoe.data.index import ShardIndex, index_shards
from vlmoe.data.sample import (
    NEEDS,
    BadSample,
    BrokenSample,
    Part,
    Sample,
    SamplePlace,
    SampleStream,
    decode_sample,
    extensions_of,
)
from vlmoe.errors import UserError

MAX_REPLACEMENTS = 8  # samples tried in place of a broken one
_SHARDS, _SUBSET, _QUOTAS, _GROUP, _REPLACE = range(5)  # what a draw of random bits is for


@dataclass(frozen=True)
class Location:
    """Where a sample lies."""

    source: str  # as the recipe writes it
    index: ShardIndex
    sample: int  # its place in the shard
    needs: tuple[Part, ...]  # what its stream reads of it

    @property
    def shard(self) -> str:
        return self.index.path

    @property
    def key(self) -> str:
        return self.index.keys[self.sample]

    def load(self) -> Sample:
        """Read and decode it; raises BrokenSample."""
        members = self.index.read(self.sample, extensions_of(self.needs))
        return decode_sample(members, key=self.key, source=self.shard, needs=self.needs)


@dataclass(frozen=True)
class _Source:
    pattern: str
    shards: list[int]  # places in Stream.shards
    num_samples: int
    draws: int  # in an epoch


@dataclass(frozen=True)
class _Epoch:
    shards: Int[np.ndarray, " visits"]
    counts: Int[np.ndarray, " visits"]  # samples drawn; fewer than the shard has: a random subset
    ends: Int[np.ndarray, " groups"]  # place in the epoch where each group ends


@dataclass(frozen=True)
class _Group:
    shards: Int[np.ndarray, " draws"]
    samples: Int[np.ndarray, " draws"]


def open_streams(config: DataConfig, names: Sequence[str], *, seed: int) -> dict[str, SampleStream]:
    """The streams of a recipe with these names, which are all turned on.

    Raises:
        UserError: one of them has no samples, or a shard both to train on and held out.
    """
    shared = {"seed": seed, "shuffle_shards": config.shuffle_shards}
    on = {name: getattr(config, name) for name in names}
    streams = {name: Stream(each.sources, name=name, batch_size=each.batch_size, **shared) for name, each in on.items()}
    for name, stream in streams.items():
        _check_held_out(on[name].eval_shards, stream)
    return dict(streams)


def open_held_out(config: DataConfig, names: Sequence[str]) -> dict[str, Sequence[SamplePlace]]:
    """The held-out samples of those of the streams that name some."""
    shards = {name: getattr(config, name).eval_shards for name in names}
    return {name: held_out_samples(patterns, name) for name, patterns in shards.items() if patterns}


def open_shards(pattern: str, *, recipe_key: str) -> list[ShardIndex]:
    """Index the tar files that a pattern with braces (`{000..007}`) or a wildcard (`*`) names, in sorted order.

    Raises:
        UserError: a file is missing or no tar file, or there is not one sample; the line names the recipe's key.
    """
    paths = _paths_of(pattern, recipe_key)
    indexes = index_shards(paths)
    if not any(len(index) for index in indexes):
        raise UserError(f"{recipe_key}: the {len(paths)} shards of {pattern!r} hold no sample; make them again")
    return indexes


def _paths_of(pattern: str, recipe_key: str) -> list[str]:
    try:
        named = expand_urls(os.path.expanduser(pattern))
    except ValueError as error:
        raise UserError(f"{recipe_key}: the braces of {pattern!r} do not match ({error})") from None
    paths = sorted(path for name in named for path in (glob.glob(name) if "*" in name else [name]))
    if not paths:
        raise UserError(f"{recipe_key}: no file matches {pattern!r}; make the shards (docs/data.md) or change the key")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{recipe_key}: {len(missing)} of {len(paths)} shards of {pattern!r} do not exist, first {missing[0]}; "
            "make the shards (docs/data.md) or change the key"
        )
    return paths


def held_out_samples(patterns: Sequence[str], stream: str) -> list[Location]:
    """Every sample of the held-out shards of a stream, in order; a shard that comes twice counts once.

    Raises:
        UserError: a pattern names no shards.
    """
    found: dict[str, list[Location]] = {}  # by the real path of the shard
    for number, pattern in enumerate(patterns):
        for index in open_shards(pattern, recipe_key=_key_of_held_out(stream, number)):
            samples = [Location(pattern, index, sample, NEEDS[stream]) for sample in range(len(index))]
            found.setdefault(os.path.realpath(index.path), samples)
    return [sample for samples in found.values() for sample in samples]


def _check_held_out(patterns: Sequence[str], stream: "Stream") -> None:
    trained_on = {os.path.realpath(index.path) for index in stream.shards}
    for number, pattern in enumerate(patterns):
        recipe_key = _key_of_held_out(stream.name, number)
        for path in _paths_of(pattern, recipe_key):
            if os.path.realpath(path) in trained_on:
                raise UserError(f"{recipe_key}: {path} is one of data.{stream.name}.sources too; name it in only one")


def _key_of_held_out(stream: str, number: int) -> str:
    return f"data.{stream}.eval_shards[{number}]"


def read_or_replace(
    stream: str, locate: Callable[[int], SamplePlace], prepare: Callable[[Sample], Any], *, hint: str
) -> tuple[Any, list[BadSample]]:
    """The first sample of `locate(0)`, `locate(1)`, ... that is whole, prepared, and the broken ones before it."""
    bad: list[BadSample] = []
    for attempt in range(1 + MAX_REPLACEMENTS):
        place = locate(attempt)
        try:
            return prepare(place.load()), bad
        except BrokenSample as error:
            bad.append(BadSample(stream, error.cause, place.shard, place.key))
    causes = ", ".join(dict.fromkeys(each.cause for each in bad))
    raise UserError(
        f"stream {stream}: {len(bad)} samples in a row are broken ({causes}), last {bad[-1].shard} key {bad[-1].key}: {hint}"
    )


def random_bits(count: int, seed: int, stream: str, *what: int) -> np.ndarray:
    """Raw 64-bit words of PCG64, a pure function of the arguments."""
    return np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(stream.encode()), *what])).random_raw(count)


def permutation(count: int, seed: int, stream: str, *what: int) -> Int[np.ndarray, " count"]:
    return np.argsort(random_bits(count, seed, stream, *what), kind="stable")


class Stream:
    """An endless, seeded order over the samples of some sources.

    Args:
        sources: shards and how often an epoch passes over them.
        name: images, texts or pairs; says what a sample must have.
        batch_size: samples per optimiser step, over all ranks and accumulation steps.
        seed: of the order.
        shuffle_shards: visits to shards whose samples are permuted together.

    Raises:
        UserError: no source, no sample, or a number out of range.
    """

    def __init__(
        self, sources: Sequence[SourceConfig], *, name: str, batch_size: int, seed: int, shuffle_shards: int
    ) -> None:
        if batch_size < 1:
            raise UserError(f"data.{name}.batch_size is {batch_size}: set it to 1 or more, or to 0 to turn it off")
        if not sources:
            raise UserError(
                f"data.{name}.batch_size is {batch_size} but data.{name}.sources is empty: name some shards"
            )
        if shuffle_shards < 1:
            raise UserError(f"data.shuffle_shards is {shuffle_shards}: set it to 1 or more")
        if seed < 0:
            raise UserError(f"seed is {seed}: set it to 0 or more")
        self.name = name
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self.needs = NEEDS[name]
        self.shards: list[ShardIndex] = []
        self._sources: list[_Source] = []
        for number, source in enumerate(sources):
            key = f"data.{name}.sources[{number}]"
            if source.upsampling <= 0:
                raise UserError(f"{key}.upsampling is {source.upsampling:g}: set it above 0, or remove the source")
            found = open_shards(source.shards, recipe_key=f"{key}.shards")
            total = sum(map(len, found))
            places = list(range(len(self.shards), len(self.shards) + len(found)))
            self.shards += found
            self._sources.append(_Source(source.shards, places, total, draws=round(total * source.upsampling)))
        self.epoch_length = sum(source.draws for source in self._sources)
        if self.epoch_length == 0:
            raise UserError(f"data.{name}.sources: an epoch has no samples; raise the upsampling")
        self._epoch_memo: tuple[int, _Epoch] | None = None
        self._group_memo: tuple[int, int, _Group] | None = None

    def locate(self, position: int, attempt: int = 0) -> Location:
        """The sample at a position of the endless order, or (attempt > 0) one of those that may stand in for it."""
        epoch, place = divmod(position, self.epoch_length)
        if attempt:
            others = max(1, self.epoch_length - 1)
            first = int(self._bits(1, epoch, _REPLACE, place)[0] % np.uint64(others))
            place = (place + 1 + (first + attempt - 1) % others) % self.epoch_length
        plan = self._epoch(epoch)
        group = int(np.searchsorted(plan.ends, place, side="right"))
        start = int(plan.ends[group - 1]) if group else 0
        draws = self._group(epoch, group)
        shard, sample = int(draws.shards[place - start]), int(draws.samples[place - start])
        source = next(each for each in self._sources if shard <= each.shards[-1])
        return Location(source=source.pattern, index=self.shards[shard], sample=sample, needs=self.needs)

    def read(
        self, position: int, prepare: Callable[[Sample], Any] = lambda sample: sample
    ) -> tuple[Any, list[BadSample]]:
        """The sample of a position as `prepare` returns it, and the broken ones that were met on the way to it.

        `prepare` may raise BrokenSample as well.

        Raises:
            UserError: the sample and the eight that were tried in its place are all broken.
        """
        hint = f"check that its shards hold what data.{self.name} needs ({', '.join(self.needs)})"
        return read_or_replace(self.name, partial(self.locate, position), prepare, hint=hint)

    def _bits(self, count: int, *what: int) -> np.ndarray:
        return random_bits(count, self.seed, self.name, *what)

    def _permutation(self, count: int, *what: int) -> Int[np.ndarray, " count"]:
        return permutation(count, self.seed, self.name, *what)

    def _epoch(self, epoch: int) -> _Epoch:
        if self._epoch_memo is None or self._epoch_memo[0] != epoch:
            self._epoch_memo = epoch, self._make_epoch(epoch)
        return self._epoch_memo[1]

    def _make_epoch(self, epoch: int) -> _Epoch:
        visits: list[tuple[int, int]] = []
        for number, source in enumerate(self._sources):
            passes, rest = divmod(source.draws, source.num_samples)
            visits += [(shard, len(self.shards[shard])) for shard in source.shards] * passes
            shuffled = self._permutation(len(source.shards), epoch, _QUOTAS, number)
            shards = [source.shards[each] for each in shuffled]
            ends = np.cumsum([len(self.shards[shard]) for shard in shards]) * rest // source.num_samples
            visits += zip(shards, np.diff(ends, prepend=0).tolist(), strict=True)
        order = self._permutation(len(visits), epoch, _SHARDS)
        shards, counts = np.array(visits, dtype=np.int64)[order].T
        shards, counts = shards[counts > 0], counts[counts > 0]
        ends = np.cumsum(counts)
        last = np.arange(self.shuffle_shards, len(ends) + self.shuffle_shards, self.shuffle_shards) - 1
        return _Epoch(shards=shards, counts=counts, ends=ends[np.minimum(last, len(ends) - 1)])

    def _group(self, epoch: int, group: int) -> _Group:
        if self._group_memo is None or self._group_memo[:2] != (epoch, group):
            self._group_memo = epoch, group, self._make_group(epoch, group)
        return self._group_memo[2]

    def _make_group(self, epoch: int, group: int) -> _Group:
        plan = self._epoch(epoch)
        visits = slice(group * self.shuffle_shards, (group + 1) * self.shuffle_shards)
        shards, counts = plan.shards[visits], plan.counts[visits]
        samples = [self._samples_of_visit(epoch, int(s), int(n)) for s, n in zip(shards, counts, strict=True)]
        order = self._permutation(int(counts.sum()), epoch, _GROUP, group)
        return _Group(shards=np.repeat(shards, counts)[order], samples=np.concatenate(samples)[order])

    def _samples_of_visit(self, epoch: int, shard: int, count: int) -> Int[np.ndarray, " count"]:
        length = len(self.shards[shard])
        return np.arange(length) if count == length else self._permutation(length, epoch, _SUBSET, shard)[:count]
