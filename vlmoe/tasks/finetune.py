"""What the fine-tunings share: inputs, auxiliary losses, examples in and records out. `start.py` has where they start."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmoe.config import FinetuneConfig
from vlmoe.data import (
    Example,
    Examples,
    ExampleStream,
    Pixels,
    SamplePlace,
    SampleStream,
    Tokenizer,
    eval_transform,
    open_examples,
    train_transform,
)
from vlmoe.data.examples import STREAM
from vlmoe.errors import UserError
from vlmoe.nn.router import Routing, TopKRouter, load_balancing_loss, router_z_loss

STREAMS = (STREAM,)


def check_finetune(config: FinetuneConfig) -> None:
    """Raises UserError where no example is to be read."""
    if not config.data.examples.batch_size:
        raise UserError(f"task {config.task} reads data.examples: set data.examples.batch_size and its sources")


def freeze_routers(model: nn.Module) -> None:
    """Routers keep the weights that they start with; everything else trains on."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.requires_grad_(False)


def auxiliary_loss(
    routings: Mapping[str, Routing], config: FinetuneConfig, num_micro_batches: float | Tensor
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """(weighted sum over expert banks for one micro-batch, the terms for the log); (0, {}) for a dense model."""
    if not routings:
        return 0.0, {}
    balance = torch.stack([load_balancing_loss(each) for each in routings.values()]).sum() / num_micro_batches
    z = torch.stack([router_z_loss(each) for each in routings.values()]).sum() / num_micro_batches
    means = {"load_balancing": balance.detach() / len(routings), "router_z": z.detach() / len(routings)}
    return config.load_balancing * balance + config.router_z * z, means


def prepare_image(image: Pixels | None, config: FinetuneConfig, rng: np.random.Generator, training: bool) -> Pixels:
    """A picture of an example as the recipe's transform (training), or whole and unchanged, or grey: uint8 [3, H, W]."""
    assert image is not None
    size = config.model.image_size
    if config.blind:
        return torch.full((3, size, size), 127, dtype=torch.uint8)
    if training:
        return train_transform(image, rng, image_size=size, **vars(config.data.transform))
    return eval_transform(image, image_size=size)


def prepare_text(text: str, config: FinetuneConfig, tokenizer: Tokenizer) -> Tensor:
    """<s> ids </s>, int64 [length]."""
    return torch.tensor(tokenizer.encode_with_specials(text, config.model.max_text_length))


def open_training(config: FinetuneConfig, check: Callable[[Example], None]) -> Examples:
    """The examples of `data.examples.sources`; `check` raises a UserError for one that the task cannot learn from."""
    examples = open_examples(config.data.examples.sources, recipe_key="data.examples.sources")
    for example in examples.whole():
        check(example)
    return examples


def stream_of(examples: Examples, config: FinetuneConfig) -> dict[str, SampleStream]:
    """Raises UserError where more pictures are missing than `data.max_bad_fraction` allows: better now than at step 500."""
    examples.check_pictures(max_missing=config.data.max_bad_fraction)
    return {STREAM: ExampleStream(examples, batch_size=config.data.examples.batch_size, seed=config.seed)}


class HeldOut:
    """The examples that a task is scored on, and the check that each was scored just once."""

    def __init__(
        self, config: FinetuneConfig, check: Callable[[Example], None], is_labelled: Callable[[Example], bool]
    ) -> None:
        """A test set has no labels at all; one with some of them missing is refused, since they would count for nothing.

        Raises:
            UserError: a row is wrong or its picture is missing: better now than after an hour.
        """
        sources = config.data.examples.eval_sources
        self.examples = open_examples(sources, recipe_key="data.examples.eval_sources") if sources else None
        self.ids: list[int | str] = []
        unlabelled: list[str] = []
        for example in self.examples or ():
            check(example)
            self.ids.append(example.id)
            if not is_labelled(example):
                unlabelled.append(example.where)
        if 0 < len(unlabelled) < len(self.ids):
            raise UserError(
                f"{unlabelled[0]}: there is nothing to score this by, though other held-out examples have it"
            )
        if self.examples is not None:
            self.examples.check_pictures()

    def places(self) -> dict[str, Sequence[SamplePlace]]:
        if self.examples is None:
            return {}
        return {STREAM: [self.examples.place(number) for number in range(len(self.examples))]}

    def in_order(self, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records in the order of the index files.

        Raises:
            UserError: an example has no record, for its picture could not be read.
        """
        found = {record["id"]: record for record in records}
        missing = [number for number, key in enumerate(self.ids) if key not in found]
        if missing and self.examples is not None:
            raise UserError(
                f"{len(missing)} of {len(self.ids)} held-out examples could not be read, first id "
                f"{self.ids[missing[0]]!r}; see {self.examples[missing[0]].where}. An evaluation leaves nothing out: "
                f"`vlmoe check-data RECIPE` says what is wrong with it"
            )
        return [found[key] for key in self.ids]


def describe_finetune(model: nn.Module, config: FinetuneConfig, what: str) -> str:
    parameters = sum(each.numel() for each in model.parameters()) / 1e6
    start = f"starting from {config.init}" if config.init else "starting from scratch"
    return f"{config.task}: {parameters:.2f} M parameters, {what}, {start}"


def need(example: Example, task: str, *, images: int = 1, texts: bool = False, meta: Iterable[str] = ()) -> None:
    """Raises UserError where an example lacks what a task reads of it."""
    if len(example.images) != images:
        raise UserError(
            f"{example.where}: task {task} wants {images} picture(s), this example has {len(example.images)}"
        )
    if texts and not any(text.strip() for text in example.texts):
        raise UserError(f"{example.where}: task {task} needs a text, this example has none")
    for key in meta:
        if key not in example.meta:
            raise UserError(f"{example.where}: task {task} needs {key!r}, this example has none")
