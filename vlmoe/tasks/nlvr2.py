"""Task `nlvr2`: is a sentence true of two pictures? (Suhr et al. 2019, arXiv:1811.00491.)"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlmoe.config import NLVR2Config
from vlmoe.data import Example, Sample, SamplePlace, SampleStream, load_tokenizer
from vlmoe.data.text import tokenizer_digest
from vlmoe.errors import UserError
from vlmoe.metrics import nlvr2_scores
from vlmoe.models.build import build_encoder, check_model
from vlmoe.models.heads import NLVR2Model
from vlmoe.tasks import finetune
from vlmoe.tasks.start import TOKENIZER_FILE, start_encoder
from vlmoe.tasks.task import Inputs, TaskLoss, Totals

LABELS = ("False", "True")  # classes 0 and 1 of the released heads


class NLVR2:
    def __init__(self, config: NLVR2Config, device: torch.device) -> None:
        check_model(config.model)
        self.config, self.streams = config, finetune.STREAMS
        self.tokenizer = load_tokenizer(config.data.text)
        self.files = {TOKENIZER_FILE: tokenizer_digest(config.data.text)}
        self.pad_id, self.max_text_length = self.tokenizer.pad_id, config.model.max_text_length

    def build_model(self) -> NLVR2Model:
        model = NLVR2Model(build_encoder(self.config.model, self.tokenizer.vocab_size), len(LABELS))
        if self.config.freeze_routers:
            finetune.freeze_routers(model)
        return model

    def start(self, model: nn.Module) -> None:
        assert isinstance(model, NLVR2Model)
        start_encoder(model.encoder, self.config, self.tokenizer.vocab_size)

    def describe(self, model: nn.Module) -> str:
        return finetune.describe_finetune(model, self.config, "two pictures a sentence")

    @cached_property
    def held_out(self) -> finetune.HeldOut:
        return finetune.HeldOut(self.config, self.check, lambda each: "label" in each.meta)

    def open_streams(self) -> dict[str, SampleStream]:
        finetune.check_finetune(self.config)
        return finetune.stream_of(finetune.open_training(self.config, self.check_labelled), self.config)

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        return self.held_out.places()

    def check(self, example: Example) -> None:
        finetune.need(example, "nlvr2", images=2, texts=True)
        if str(example.id).count("-") < 3:
            raise UserError(
                f"{example.where}: id {example.id!r} is not split-set-pair-sentence, such as dev-850-0-0; "
                f"consistency groups by it"
            )
        if example.meta.get("label", LABELS[0]) not in LABELS:
            raise UserError(f'{example.where}: label is {example.meta["label"]!r}; write "True" or "False"')

    def check_labelled(self, example: Example) -> None:
        self.check(example)
        finetune.need(example, "nlvr2", images=2, meta=("label",))

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            "image": finetune.prepare_image(sample.image, self.config, rng, training),
            "image_b": finetune.prepare_image(sample.image_b, self.config, rng, training),
            "text": finetune.prepare_text(sample.texts[0], self.config, self.tokenizer),
        }
        if training:
            return {**tensors, "label": torch.tensor(LABELS.index(sample.meta["label"]))}
        return {**tensors, "example": sample.meta}

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        return {"sentences": len(inputs["examples"]["image"]), "micro_batches": 1}

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        part = inputs["examples"]
        out = model(
            part["image"], part["text"], image_b=part["image_b"], text_padding=part["text_padding"], text_at=part["text_at"]
        )  # fmt: skip
        loss = F.cross_entropy(out.logits.float(), part["label"], reduction="sum") / num_targets["sentences"]
        auxiliary, metrics = finetune.auxiliary_loss(out.routings, self.config, num_targets["micro_batches"])
        return TaskLoss(loss + auxiliary, {"sentences": loss.detach(), **metrics})

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        pass

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        """One record per example: its row, and what the model says of it."""
        part = inputs["examples"]
        out = model(part["image"], part["text"], image_b=part["image_b"], text_padding=part["text_padding"])
        best = out.logits.argmax(-1).tolist()
        return [{**each, "prediction": LABELS[label]} for each, label in zip(part["example"], best, strict=True)]

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        records = self.held_out.in_order(predictions)
        labelled = [{"identifier": each["id"], "label": each["label"]} for each in records if "label" in each]
        figures = {"examples": float(len(records))}
        if labelled:
            figures |= nlvr2_scores(labelled, {each["id"]: each["prediction"] for each in records})
        return figures

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """The file that the official scorer reads: a line `identifier,True` or `identifier,False` for each example."""
        records = self.held_out.in_order(predictions)
        return {"nlvr2_results.csv": "".join(f"{each['id']},{each['prediction']}\n" for each in records)}
