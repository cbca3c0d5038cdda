"""How long functions take on a GPU, at the clock at which they can run on."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

ROUNDS = 5
SECONDS_OF_WARM_UP = 0.15  # of each function in each round


def rounds_ms(functions: Sequence[Callable[[], object]], repeats: int, rounds: int = ROUNDS) -> list[list[float]]:
    """Of each function the median of `repeats` calls in each round, by device events. In a round one function after another
    runs for a while first, which fills caches and lets the power limit set the clock; inputs are larger than the L2 cache."""
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, medians in zip(functions, found, strict=True):
            start = time.monotonic()
            while time.monotonic() - start < SECONDS_OF_WARM_UP:
                for _ in range(repeats):
                    function()
                torch.cuda.synchronize()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
            for first, last in events:
                first.record()
                function()
                last.record()
            torch.cuda.synchronize()
            medians.append(statistics.median(first.elapsed_time(last) for first, last in events))
    return found


def median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 4)


def replayed(function: Callable[[], object]) -> Callable[[], object]:
    """The same kernels from a CUDA graph: what the device needs, without the gaps between small launches."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
