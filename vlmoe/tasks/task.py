"""What a task is: everything that differs between pretraining, the visual tokenizer and the fine-tunings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from vlmoe.data import Sample, SamplePlace, SampleStream

Inputs = dict[str, dict[str, Any]]  # stream -> its collated tensors
Totals = Mapping[str, float | Tensor]  # how many things each term of a loss averages over


@dataclass(frozen=True)
class TaskLoss:
    total: Tensor  # differentiable scalar
    metrics: dict[str, Tensor]  # scalars for the log; like the total, they add up over micro-batches and ranks
    state: Any = None  # what `after_step` needs


class Task(Protocol):
    """A new benchmark is one class like this, made from (config, device), and one recipe."""

    @property
    def streams(self) -> tuple[str, ...]:
        """What it reads of `data`."""
        ...

    @property
    def files(self) -> dict[str, str]:
        """Name -> text that every checkpoint carries beside its tensors, such as the labels."""
        ...

    @property
    def pad_id(self) -> int | None:
        """Of its texts; None where it reads none."""
        ...

    @property
    def max_text_length(self) -> int | None: ...

    def build_model(self) -> nn.Module:
        """The model, on the CPU, freshly initialised."""
        ...

    def start(self, model: nn.Module) -> None:
        """Fill a fresh model from what the recipe says to start from. Not called where a run goes on."""
        ...

    def open_streams(self) -> dict[str, SampleStream]:
        """What it trains on, by stream."""
        ...

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        """What it is scored on, by stream; a stream without held-out samples is absent."""
        ...

    def describe(self, model: nn.Module) -> str:
        """Lines to print at the start of a run."""
        ...

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        """One sample -> its tensors. Every random choice comes from `rng`. May raise BrokenSample."""
        ...

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        """How many things each term of the loss averages over; the trainer sums them over ranks and micro-batches."""
        ...

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        """Sum over this micro-batch divided by `num_targets`, so that splitting a batch changes nothing."""
        ...

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        """Called once per optimiser step with the `state` of each micro-batch."""
        ...

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        """A held-out batch of one stream -> records that `score` understands."""
        ...

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        """All records of an evaluation -> its figures."""
        ...

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """File name -> content of what an evaluation writes beside `metrics.json`."""
        ...
