"""Task `visual_tokenizer`: learn discrete codes for image patches (BEiT v2, VQ-KD)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlmoe.config import VisualTokenizerConfig
from vlmoe.data import SamplePlace, SampleStream, open_held_out, open_streams
from vlmoe.data.sample import Sample
from vlmoe.data.transforms import eval_transform, train_transform
from vlmoe.errors import UserError
from vlmoe.metrics.perplexity import unigram_perplexity
from vlmoe.models.visual_tokenizer import VisualTokenizer, build_visual_tokenizer
from vlmoe.tasks.task import Inputs, TaskLoss, Totals


class TrainVisualTokenizer:
    """Loss: distance of the decoded features to the teacher's + `commitment` * |code - vector|^2 (BEiT v2, eq. 6)."""

    def __init__(self, config: VisualTokenizerConfig, device: torch.device) -> None:
        if not config.data.images.batch_size:
            raise UserError("task visual_tokenizer reads data.images: set data.images.batch_size and its sources")
        self.config = config
        self.streams = ("images",)
        self.files: dict[str, str] = {}
        self.pad_id = self.max_text_length = None

    def build_model(self) -> VisualTokenizer:
        return build_visual_tokenizer(self.config)

    def start(self, model: nn.Module) -> None:
        pass

    def open_streams(self) -> dict[str, SampleStream]:
        return open_streams(self.config.data, self.streams, seed=self.config.seed)

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        return open_held_out(self.config.data, self.streams)

    def describe(self, model: nn.Module) -> str:
        c = self.config
        patches = (c.image_size // c.patch_size) ** 2
        return (
            f"visual tokenizer: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
            f"{patches} codes of {c.num_codes} per "
            f"{c.image_size}-pixel image, teacher {c.teacher}"
        )

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        assert sample.image is not None
        size = self.config.image_size
        if training:
            return {"image": train_transform(sample.image, rng, image_size=size, **vars(self.config.data.transform))}
        return {"image": eval_transform(sample.image, image_size=size)}

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        return {"images": len(inputs["images"]["image"])}

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        image = inputs["images"]["image"]
        out = model(image)
        share = len(image) / num_targets["images"]
        teacher = tokenizer_of(model).teacher
        distance = teacher.distance(out.features, teacher.features(image)) * share
        quantised = tokenizer_of(model).codebook.weight[out.codes]
        commitment = F.mse_loss(out.vectors, quantised) * share
        return TaskLoss(
            total=distance + self.config.commitment * commitment,
            metrics={"distance": distance.detach(), "commitment": commitment.detach()},
            state=out.vectors.detach().flatten(0, 1),
        )

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        tokenizer_of(model).codebook.update(
            torch.cat(states), decay=self.config.ema_decay, revive_after=self.config.revive_after
        )

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        image = inputs["images"]["image"]
        out = model(image)
        teacher = tokenizer_of(model).teacher
        counts = torch.bincount(out.codes.flatten(), minlength=self.config.num_codes)
        distance = teacher.distance(out.features, teacher.features(image))
        mean_colour = image.mean((2, 3), keepdim=True).expand_as(image)
        baseline = teacher.distance(teacher.features(mean_colour), teacher.features(image))
        return [{"n": len(image), "distance": float(distance), "baseline": float(baseline), "counts": counts.cpu()}]

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        n = sum(each["n"] for each in predictions)
        counts = torch.stack([each["counts"] for each in predictions]).sum(0)
        return {
            "distance": sum(each["n"] * each["distance"] for each in predictions) / n,
            "distance_of_mean_colour": sum(each["n"] * each["baseline"] for each in predictions) / n,
            "codes_in_use": float((counts > 0).sum()),
            "codes_in_use_fraction": float((counts > 0).float().mean()),
            "code_perplexity": unigram_perplexity(counts.numpy()),
        }

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        return {}


def tokenizer_of(model: nn.Module) -> VisualTokenizer:
    assert isinstance(model, VisualTokenizer)
    return model
