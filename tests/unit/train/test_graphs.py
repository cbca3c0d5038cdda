"""When a step is recorded and what it then reads, with graphs that play nothing; the GPU tests have real ones."""

from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from vlmoe.data import Batch
from vlmoe.errors import UserError
from vlmoe.train.graphs import WARM_UP, GraphedUpdate
from vlmoe.train.optim import set_learning_rate


class SilentGraph:
    def __init__(self) -> None:
        self.played = 0

    def pool(self) -> None:
        pass

    def replay(self) -> None:
        self.played += 1


@contextmanager
def recording(graph: SilentGraph, **_: object):
    yield


def optimizer() -> torch.optim.Optimizer:
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
    made.param_groups[0]["lr_scale"] = 0.5
    return made


def batch(value: float, rows: int) -> Batch:
    return Batch({"examples": {"x": torch.full((rows, 2), value), "names": ["a"] * rows}})


def test_a_kind_of_step_is_recorded_after_its_warm_up_and_reads_the_new_batch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SilentGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    calls: list[tuple[int, float]] = []

    def update(micro_batches: list[Batch], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append((len(micro_batches[0].inputs["examples"]["x"]), float(totals["examples"])))
        return {"loss": torch.zeros(())}

    step = GraphedUpdate(update, optimizer())
    for number in range(WARM_UP + 3):
        for rows in (4, 3):
            step([batch(number, rows)], {"examples": torch.tensor(10.0 * number + rows)})
    assert calls == [(rows, 10.0 * number + rows) for number in range(WARM_UP + 1) for rows in (4, 3)]
    assert [cast(Any, each.graph).played for each in step.recorded.values()] == [3, 3]
    for each in step.recorded.values():
        (own,) = each.micro_batches
        assert (own.inputs["examples"]["x"] == WARM_UP + 2).all() and "names" not in own.inputs["examples"]
        assert each.totals["examples"] == 10 * (WARM_UP + 2) + len(own.inputs["examples"]["x"])


def test_the_learning_rate_is_a_tensor_that_is_filled():
    made = optimizer()
    GraphedUpdate(lambda *_: {}, made)
    rate = made.param_groups[0]["lr"]
    set_learning_rate(made, 0.2)
    assert made.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.1)


def test_a_step_that_waits_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SilentGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)

    def update(micro_batches: list[Batch], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(waited) == WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        waited.append(None)
        return {}

    waited: list[None] = []
    step = GraphedUpdate(update, optimizer())
    with pytest.raises(UserError, match=r"stream is capturing\): set cuda_graphs=false"):
        for _ in range(WARM_UP + 1):
            step([batch(1, 2)], {"examples": torch.tensor(2.0)})
