"""Task `classification`: one label for a picture, from the vision half of the encoder alone."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlmoe.config import ClassificationConfig
from vlmoe.data import Example, Examples, Sample, SamplePlace, SampleStream, load_tokenizer
from vlmoe.data.text import tokenizer_digest
from vlmoe.errors import UserError
from vlmoe.models.build import build_encoder, check_model
from vlmoe.models.heads import ClassificationModel
from vlmoe.tasks import finetune
from vlmoe.tasks.labels import LABELS_FILE, labels_text, read_labels
from vlmoe.tasks.start import TOKENIZER_FILE, start_encoder
from vlmoe.tasks.task import Inputs, TaskLoss, Totals

TOP = 5  # labels of a prediction


class Classification:
    def __init__(self, config: ClassificationConfig, device: torch.device) -> None:
        check_model(config.model)
        self.config, self.streams = config, finetune.STREAMS
        self.vocab_size = load_tokenizer(config.data.text).vocab_size  # the encoder keeps its text half
        self.pad_id = self.max_text_length = None
        self.labels = (
            read_labels(config.labels)
            if config.labels
            else sorted({each.meta["label"] for each in self.training.whole()})
        )
        self.number_of = {label: number for number, label in enumerate(self.labels)}
        self.files = {LABELS_FILE: labels_text(self.labels), TOKENIZER_FILE: tokenizer_digest(config.data.text)}

    def build_model(self) -> ClassificationModel:
        encoder = build_encoder(self.config.model, self.vocab_size, final_norm=False)
        model = ClassificationModel(encoder, len(self.labels))
        if self.config.freeze_routers:
            finetune.freeze_routers(model)
        return model

    def start(self, model: nn.Module) -> None:
        assert isinstance(model, ClassificationModel)
        start_encoder(model.encoder, self.config, self.vocab_size)

    def describe(self, model: nn.Module) -> str:
        return finetune.describe_finetune(model, self.config, f"{len(self.labels)} labels")

    @cached_property
    def training(self) -> Examples:
        return finetune.open_training(self.config, self.check_labelled)

    @cached_property
    def held_out(self) -> finetune.HeldOut:
        return finetune.HeldOut(self.config, self.check, lambda each: "label" in each.meta)

    def open_streams(self) -> dict[str, SampleStream]:
        finetune.check_finetune(self.config)
        for example in self.training:
            self.check(example)
        return finetune.stream_of(self.training, self.config)

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        return self.held_out.places()

    def check(self, example: Example) -> None:
        finetune.need(example, "classification")
        label = example.meta.get("label")
        if label is not None and label not in self.number_of:
            raise UserError(
                f"{example.where}: label {label!r} is not among the {len(self.labels)} labels of "
                f"{self.config.labels or 'data.examples.sources'}"
            )

    def check_labelled(self, example: Example) -> None:
        finetune.need(example, "classification", meta=("label",))
        if len(example.meta["label"].splitlines()) != 1:
            raise UserError(
                f"{example.where}: label {example.meta['label']!r} is no line of text, as {LABELS_FILE} needs"
            )

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        image = finetune.prepare_image(sample.image, self.config, rng, training)
        if training:
            return {"image": image, "label": torch.tensor(self.number_of[sample.meta["label"]])}
        return {"image": image, "example": sample.meta}

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        return {"images": len(inputs["examples"]["image"]), "micro_batches": 1}

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        part = inputs["examples"]
        out = model(part["image"])
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(out.logits.float(), part["label"], reduction="sum", label_smoothing=smoothing)
        loss = loss / num_targets["images"]
        auxiliary, metrics = finetune.auxiliary_loss(out.routings, self.config, num_targets["micro_batches"])
        return TaskLoss(loss + auxiliary, {"labels": loss.detach(), **metrics})

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        pass

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        """One record per picture: its row, and the labels of the highest scores, best first."""
        part = inputs["examples"]
        best = model(part["image"]).logits.topk(min(TOP, len(self.labels))).indices.tolist()
        return [
            {**each, "predictions": [self.labels[number] for number in top]}
            for each, top in zip(part["example"], best, strict=True)
        ]

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        records = self.held_out.in_order(predictions)
        figures = {"examples": float(len(records))}
        if labelled := [each for each in records if "label" in each]:
            for k in sorted({1, min(TOP, len(self.labels))}):
                right = sum(each["label"] in each["predictions"][:k] for each in labelled)
                figures["accuracy" if k == 1 else f"accuracy_top{k}"] = 100 * right / len(labelled)
        return figures

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """A JSON line a picture."""
        records = self.held_out.in_order(predictions)
        lines = (json.dumps({"id": each["id"], "predictions": each["predictions"]}) for each in records)
        return {"classification_results.jsonl": "".join(f"{line}\n" for line in lines)}
