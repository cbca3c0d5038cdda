"""From streams to the batches of a run: what a step reads is a pure function of (seed, step), not of who reads it.

Sample i of micro-batch a on rank r has position step * batch_size + (a * world_size + r) * share + i of its stream,
where share = batch_size / (world_size * accumulate). So the positions of a step are the same for any number of ranks,
accumulation steps and worker processes. The random numbers of a sample come from (seed, stream, position) alone.
"""

import atexit
import multiprocessing
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmoe.data.batch import collate, to_device
from vlmoe.data.sample import BadSample, BrokenSample, Sample, SamplePlace, SampleStream
from vlmoe.errors import UserError

Prepare = Callable[[Sample, str, np.random.Generator, bool], Mapping[str, Any]]  # sample, stream, rng, training
CPU = torch.device("cpu")
_TRAIN, _EVAL = range(2)  # first word of a sample's random numbers


@dataclass(frozen=True)
class Batch:
    """What one rank reads in one forward pass."""

    inputs: dict[str, dict[str, Any]]  # by stream; a stream without a sample is absent
    seen: int = 0  # samples read, broken ones included
    bad: list[BadSample] = field(default_factory=list)
    num_targets: dict[str, int] = field(default_factory=dict)  # what `build_loader`'s count says of the inputs

    def pin_memory(self) -> "Batch":  # DataLoader looks for this name
        inputs = {
            stream: {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in values.items()}
            for stream, values in self.inputs.items()
        }
        return replace(self, inputs=inputs)

    def to(self, device: torch.device) -> "Batch":
        """On `device`, pixels as floats: see `to_device`."""
        return replace(self, inputs={stream: to_device(values, device) for stream, values in self.inputs.items()})


def build_loader(
    streams: Mapping[str, SampleStream],
    prepare: Prepare,
    *,
    seed: int,
    num_steps: int,
    first_step: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device = CPU,
    pad_id: int | None = None,
    max_text_length: int | None = None,
    count: Callable[[dict[str, dict[str, Any]]], dict[str, int]] | None = None,
    start_method: str | None = None,
) -> Iterator[list[Batch]]:
    """The batches of steps `first_step` to `num_steps - 1`: for each step a list of `accumulate` of them, on `device`.

    Args:
        streams: what a task's `open_streams` returns.
        prepare: makes the tensors of one sample; runs in the worker processes. It may raise BrokenSample.
        seed: of the samples' random numbers.
        num_steps: optimiser steps of the whole run.
        first_step: where to go on; nothing else has to be saved for an exact resume.
        accumulate: forward-backward passes per step.
        rank, world_size: this process among those that share the batch.
        workers: loader processes; 0 loads in this one.
        device: where the tensors go; from pinned memory if it is a GPU.
        pad_id, max_text_length: see `collate`.
        count: called with the inputs of each batch before they leave for the device, where counting would wait for it.
        start_method: of the worker processes: fork, spawn or forkserver; None is fork on Linux, whatever the Python and
            the process that asks, for forked workers share the examples and others each get a copy; elsewhere the platform's.

    Raises:
        UserError: a batch size cannot be shared out evenly; while iterating: nine broken samples in a row.
    """
    shares = world_size * accumulate
    for name, stream in streams.items():
        if stream.batch_size % shares:
            nearest = max(1, round(stream.batch_size / shares)) * shares
            raise UserError(
                f"data.{name}.batch_size is {stream.batch_size}, which {world_size} ranks x {accumulate} accumulation "
                f"steps cannot share evenly: set it to a multiple of {shares}, such as {nearest}"
            )
    dataset = _TrainDataset(
        streams=streams,
        prepare=prepare,
        seed=seed,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        collate=partial(collate, pad_id=pad_id, max_text_length=max_text_length),
        count=count,
    )
    work = range(first_step * accumulate, num_steps * accumulate)
    return _in_steps(_load(dataset, work, workers=workers, device=device, start_method=start_method), accumulate)


def build_eval_loader(
    samples: Sequence[SamplePlace],
    stream: str,
    prepare: Prepare,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device = CPU,
    limit: int | None = None,
    pad_id: int | None = None,
    max_text_length: int | None = None,
    start_method: str | None = None,
) -> "EvalLoader":
    """Every held-out sample once over the ranks, in order (rank r reads samples r, r + world_size, ...).

    It can be iterated again and again and gives the same each time: random numbers come from (seed, stream, place).
    Every rank yields as many batches, so that models whose forward pass communicates stay in step; a batch may be empty
    (`inputs == {}`) where a rank has no sample left or all of its samples are broken. Broken samples are skipped.

    Args:
        samples: what a task's `open_held_out` names.
        stream: name that `prepare` is called with.
        prepare: as in `build_loader`; called with training=False.
        seed: of the samples' random numbers.
        batch_size: samples in a batch of one rank.
        limit: read only so many samples, from the start; None reads all.
        rank, world_size, workers, device, pad_id, max_text_length, start_method: as in `build_loader`.
    """
    dataset = _EvalDataset(
        samples=samples[:limit],
        stream=stream,
        prepare=prepare,
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        collate=partial(collate, pad_id=pad_id, max_text_length=max_text_length),
    )
    return EvalLoader(dataset, workers=workers, device=device, start_method=start_method)


def sample_rng(seed: int, purpose: int, stream: str, position: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, zlib.crc32(stream.encode()), position]))


@dataclass(frozen=True)
class _TrainDataset(Dataset["Batch | UserError"]):
    """Item step * accumulate + a: micro-batch a of a step."""

    streams: Mapping[str, SampleStream]
    prepare: Prepare
    seed: int
    accumulate: int
    rank: int
    world_size: int
    collate: Callable[[list[Mapping[str, Any]]], dict[str, Any]]
    count: Callable[[dict[str, dict[str, Any]]], dict[str, int]] | None

    def __getitem__(self, work: int) -> "Batch | UserError":
        step, micro = divmod(work, self.accumulate)
        inputs, seen, bad = {}, 0, []
        try:
            for name, stream in self.streams.items():
                share = stream.batch_size // (self.world_size * self.accumulate)
                start = step * stream.batch_size + (micro * self.world_size + self.rank) * share
                read = [stream.read(start + i, self._prepare_for(name, start + i)) for i in range(share)]
                failed = [each for _, failures in read for each in failures]
                inputs[name] = self.collate([prepared for prepared, _ in read])
                seen += share + len(failed)
                bad += failed
        except UserError as error:  # as a value: DataLoader would wrap a traceback around it
            return error
        return Batch(inputs=inputs, seen=seen, bad=bad, num_targets=self.count(inputs) if self.count else {})

    def _prepare_for(self, stream: str, position: int) -> Callable[[Sample], Mapping[str, Any]]:
        return lambda sample: self.prepare(sample, stream, sample_rng(self.seed, _TRAIN, stream, position), True)


@dataclass(frozen=True)
class _EvalDataset(Dataset["Batch | UserError"]):
    """Item n: the n-th batch of this rank."""

    samples: Sequence[SamplePlace]
    stream: str
    prepare: Prepare
    seed: int
    batch_size: int
    rank: int
    world_size: int
    collate: Callable[[list[Mapping[str, Any]]], dict[str, Any]]

    def __len__(self) -> int:
        return -(-len(self.samples) // (self.batch_size * self.world_size))

    def __getitem__(self, number: int) -> "Batch | UserError":
        mine = range(self.rank, len(self.samples), self.world_size)
        places = mine[number * self.batch_size : (number + 1) * self.batch_size]
        prepared, bad = [], []
        for place in places:
            sample = self.samples[place]
            rng = sample_rng(self.seed, _EVAL, self.stream, place)
            try:
                prepared.append(self.prepare(sample.load(), self.stream, rng, False))
            except BrokenSample as error:
                bad.append(BadSample(self.stream, error.cause, sample.shard, sample.key))
            except UserError as error:
                return error
        return Batch({self.stream: self.collate(prepared)} if prepared else {}, len(places), bad)


@dataclass(frozen=True)
class EvalLoader:
    """The batches of `build_eval_loader`; each iteration starts anew."""

    dataset: _EvalDataset
    workers: int
    device: torch.device
    start_method: str | None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        work = range(len(self.dataset))
        return _load(self.dataset, work, workers=self.workers, device=self.device, start_method=self.start_method)


def _load(
    dataset: Dataset["Batch | UserError"],
    work: Sequence[int],
    *,
    workers: int,
    device: torch.device,
    start_method: str | None,
) -> Iterator[Batch]:
    if not work:  # a run that is complete starts no processes
        return
    if workers:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=work,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=(start_method or ("fork" if sys.platform == "linux" else None)) if workers else None,
        worker_init_fn=_init_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: making an iterator would advance the global one
    )
    try:
        for loaded in loader:
            if isinstance(loaded, UserError):
                raise loaded
            yield loaded.to(device)
    finally:
        del loader  # else the traceback of an error would keep its processes


def _in_steps(batches: Iterator[Batch], accumulate: int) -> Iterator[list[Batch]]:
    while step := list(islice(batches, accumulate)):
        yield step


def _end_workers() -> None:
    """At exit, before `multiprocessing` asks those that are left with a SIGTERM, which they ignore, and waits for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would complain
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _init_worker(worker: int) -> None:
    """Runs in each worker process, where DataLoader has already set torch to one thread."""
    # Both often reach the whole group of processes; the training process finishes its step, for which it needs its
    # workers, and ends them then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
