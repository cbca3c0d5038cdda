"""Task `retrieval`: which picture goes with a text, and which text with a picture (released BEiT-3: a dual encoder).

A visit to a picture draws one of its captions. Evaluation embeds every picture once and all of its captions, gathers them
from all ranks, and ranks all against all.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmoe.config import RetrievalConfig
from vlmoe.data import Example, Examples, Sample, SamplePlace, SampleStream, collate, load_tokenizer
from vlmoe.data.text import tokenizer_digest
from vlmoe.errors import UserError
from vlmoe.metrics import recall_at_k_of_embeddings
from vlmoe.models import RetrievalModel, build_encoder
from vlmoe.models.build import check_model
from vlmoe.tasks import finetune
from vlmoe.tasks.contrast import contrastive_loss
from vlmoe.tasks.start import TOKENIZER_FILE, start_encoder, start_heads
from vlmoe.tasks.task import Inputs, TaskLoss, Totals

KS = (1, 5, 10)


class Retrieval:
    def __init__(self, config: RetrievalConfig, device: torch.device) -> None:
        check_model(config.model)
        if config.optim.accumulate > 1:
            raise UserError(
                "task retrieval compares all pairs of a batch with each other, which accumulation would split: "
                "set optim.accumulate=1 and use more GPUs or a smaller data.examples.batch_size"
            )
        self.config, self.streams = config, finetune.STREAMS
        self.tokenizer = load_tokenizer(config.data.text)
        self.files = {TOKENIZER_FILE: tokenizer_digest(config.data.text)}
        self.pad_id, self.max_text_length = self.tokenizer.pad_id, config.model.max_text_length

    def build_model(self) -> RetrievalModel:
        model = RetrievalModel(build_encoder(self.config.model, self.tokenizer.vocab_size), self.config.model.dim)
        if self.config.freeze_routers:
            finetune.freeze_routers(model)
        return model

    def start(self, model: nn.Module) -> None:
        assert isinstance(model, RetrievalModel)
        start_encoder(model.encoder, self.config, self.tokenizer.vocab_size)
        start_heads(model, self.config)

    @cached_property
    def training(self) -> Examples:
        return finetune.open_training(self.config, self.check)

    @cached_property
    def held_out(self) -> finetune.HeldOut:
        return finetune.HeldOut(self.config, self.check, lambda _: True)

    def open_streams(self) -> dict[str, SampleStream]:
        finetune.check_finetune(self.config)
        return finetune.stream_of(self.training, self.config)

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        return self.held_out.places()

    def check(self, example: Example) -> None:
        finetune.need(example, "retrieval", texts=True)

    def describe(self, model: nn.Module) -> str:
        return finetune.describe_finetune(model, self.config, f"embeddings of {self.config.model.dim} numbers")

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        image = finetune.prepare_image(sample.image, self.config, rng, training)
        texts = [text for text in sample.texts if text.strip()]
        if not training:
            return {"image": image, "id": sample.meta["id"], "image_id": sample.meta["image_id"], "captions": texts}
        text = finetune.prepare_text(texts[rng.integers(len(texts))], self.config, self.tokenizer)
        return {"image": image, "text": text, "image_key": torch.tensor(_key(str(sample.meta["image_id"])))}

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        part = inputs["examples"]
        return {"pairs": len(part["image"]), "micro_batches": 1}

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        part = inputs["examples"]
        out = model(part["image"], part["text"], text_padding=part["text_padding"], text_at=part["text_at"])
        contrast = contrastive_loss(out.image_embedding, out.text_embedding, out.logit_scale, part["image_key"])
        contrast = contrast / num_targets["pairs"]
        auxiliary, terms = finetune.auxiliary_loss(out.routings, self.config, num_targets["micro_batches"])
        return TaskLoss(contrast + auxiliary, {"contrast": contrast.detach(), **terms})

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        pass

    def embed_texts(self, model: nn.Module, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Embeddings of unit length, on the model's device."""
        ids = [{"text": finetune.prepare_text(text, self.config, self.tokenizer)} for text in texts]
        batch = collate(ids, pad_id=self.pad_id, max_text_length=self.max_text_length)
        device = next(model.parameters()).device
        out = model(text=batch["text"].to(device), text_padding=batch["text_padding"].to(device))
        return out.text_embedding.float()

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        part = inputs["examples"]
        images = model(part["image"]).image_embedding.float().cpu().numpy()
        counts = [len(captions) for captions in part["captions"]]
        texts = self.embed_texts(model, [text for captions in part["captions"] for text in captions]).cpu().numpy()
        parts = np.split(texts, np.cumsum(counts)[:-1])
        return [
            {"id": key, "image_id": image_id, "image": image, "captions": captions, "texts": embedded}
            for key, image_id, image, captions, embedded in zip(
                part["id"], part["image_id"], images, part["captions"], parts, strict=True
            )
        ]

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        """Recalls in percent, and their mean, which the released code calls the average score.

        Rows of an index file that name the same picture are one picture with several texts.
        """
        records = self.held_out.in_order(predictions)
        pictures = {each["image_id"]: each["image"] for each in records}
        number_of = {image_id: number for number, image_id in enumerate(pictures)}
        # equal captions tie: their embeddings would differ in the last bits, by the batches that they came in
        texts: dict[str, np.ndarray] = {}
        for each in records:
            for caption, embedded in zip(each["captions"], each["texts"], strict=True):
                texts.setdefault(caption, embedded)
        recalls = recall_at_k_of_embeddings(
            np.stack(list(pictures.values())),
            np.stack([texts[caption] for each in records for caption in each["captions"]]),
            np.concatenate([np.full(len(each["texts"]), number_of[each["image_id"]]) for each in records]),
            KS,
        )
        mean = recalls.pop("mean")
        figures = {f"{direction}/{name}": value for direction, each in recalls.items() for name, value in each.items()}
        return figures | {"mean_recall": mean}

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        return {}


def _key(name: str) -> int:
    """The same number for the same name, in every process."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:7], "big")
