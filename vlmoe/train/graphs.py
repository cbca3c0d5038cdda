"""Whole optimiser steps as CUDA graphs: what the host takes two thousand launches for, it asks for in one.

A step is recorded for each set of shapes, and played for every batch that has them. A recorded step reads the batch and its
counts from tensors of its own, the learning rate from the optimiser's, and its random numbers from torch's generator, so the
weights are those of steps that are not recorded.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmoe.data import Batch
from vlmoe.errors import UserError

WARM_UP = 2  # steps of a kind that run as ever before it is recorded: kernels are compiled and tuned in them
MOST = 16  # kinds that are recorded; each keeps its gradients, and all share the memory of what a step throws away
Update = Callable[[list[Batch], dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    micro_batches: list[Batch]  # what it reads
    totals: dict[str, Tensor]  # and this
    found: dict[str, Tensor]  # what it writes


class GraphedUpdate:
    """`update`, recorded. It must wait for no device, read tensors of its arguments alone, and leave no gradient behind."""

    def __init__(self, update: Update, optimizer: torch.optim.Optimizer) -> None:
        self.update, self.optimizer = update, optimizer
        self.seen: Counter[Hashable] = Counter()
        self.recorded: dict[Hashable, _Recorded] = {}
        for group in optimizer.param_groups:  # a number would become a constant of the graph
            group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)

    def __call__(self, micro_batches: list[Batch], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step. What it returns is overwritten by the next one.

        Raises:
            UserError: the update waits for the device.
        """
        kind = tuple(_shapes(batch) for batch in micro_batches)
        self.seen[kind] += 1
        if kind not in self.recorded and (self.seen[kind] <= WARM_UP or len(self.recorded) == MOST):
            return self.update(micro_batches, totals)
        if kind not in self.recorded:
            self.recorded[kind] = self._record(micro_batches, totals)
        recorded = self.recorded[kind]
        for own, new in zip(recorded.micro_batches, micro_batches, strict=True):
            for stream, tensors in _tensors(own).items():
                for name, tensor in tensors.items():
                    tensor.copy_(new.inputs[stream][name])
        for name, total in recorded.totals.items():
            total.copy_(totals[name])
        recorded.graph.replay()
        return recorded.found

    def _record(self, micro_batches: list[Batch], totals: dict[str, Tensor]) -> _Recorded:
        own = [
            replace(batch, inputs={s: {n: t.clone() for n, t in of.items()} for s, of in _tensors(batch).items()})
            for batch in micro_batches
        ]
        own_totals = {name: total.clone() for name, total in totals.items()}
        graph = torch.cuda.CUDAGraph()
        pool = next((each.graph.pool() for each in self.recorded.values()), None)
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # torch asks for it while recording, and warns of it at other times
        # thread_local: the loader's thread pins memory meanwhile, which has nothing to do with this
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                found = self.update(own, own_totals)
        except RuntimeError as error:
            raise UserError(
                f"a step of this recipe cannot be recorded ({str(error).splitlines()[0]}): set cuda_graphs=false, or "
                f"model.ffn.backend to triton or grouped, which wait for no device"
            ) from None
        for group in self.optimizer.param_groups:
            group["capturable"] = False
        return _Recorded(graph, own, own_totals, found)


def _tensors(batch: Batch) -> dict[str, dict[str, Tensor]]:
    return {s: {n: t for n, t in of.items() if isinstance(t, Tensor)} for s, of in batch.inputs.items()}


def _shapes(batch: Batch) -> Hashable:
    return tuple((s, n, tuple(t.shape)) for s, of in _tensors(batch).items() for n, t in of.items())
