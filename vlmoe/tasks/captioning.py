"""Task `captioning`: write a caption for a picture (released BEiT-3: a prefix language model, decoded by beam search).

Training hides `mask_ratio` of a caption's tokens, </s> among them but never <s>, and asks for them from the picture and the
words before. Of the hidden tokens 80 % become <mask>, 10 % another token, and 10 % stay (unilm beit3, datasets.py).
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vlmoe.config import CaptioningConfig
from vlmoe.data import Example, Examples, Sample, SamplePlace, SampleStream, Tokenizer, load_tokenizer
from vlmoe.data.text import tokenizer_digest
from vlmoe.metrics import caption_scores
from vlmoe.models import CaptioningModel, build_encoder
from vlmoe.models.build import check_model
from vlmoe.models.generate import generate_captions
from vlmoe.models.heads import targets_at
from vlmoe.tasks import finetune
from vlmoe.tasks.start import TOKENIZER_FILE, start_encoder, start_heads
from vlmoe.tasks.task import Inputs, TaskLoss, Totals

MASKED, REPLACED = 0.8, 0.1  # of the hidden tokens; the rest stays


class Captioning:
    def __init__(self, config: CaptioningConfig, device: torch.device) -> None:
        check_model(config.model)
        self.config, self.streams = config, finetune.STREAMS
        self.tokenizer = load_tokenizer(config.data.text)
        self.files = {TOKENIZER_FILE: tokenizer_digest(config.data.text)}
        self.pad_id, self.max_text_length = self.tokenizer.pad_id, config.model.max_text_length

    def build_model(self) -> CaptioningModel:
        vocab_size = self.tokenizer.vocab_size
        model = CaptioningModel(build_encoder(self.config.model, vocab_size), vocab_size)
        if self.config.freeze_routers:
            finetune.freeze_routers(model)
        return model

    def start(self, model: nn.Module) -> None:
        assert isinstance(model, CaptioningModel)
        start_encoder(model.encoder, self.config, self.tokenizer.vocab_size)
        start_heads(model, self.config)

    @cached_property
    def training(self) -> Examples:
        return finetune.open_training(self.config, self.check_labelled)

    @cached_property
    def held_out(self) -> finetune.HeldOut:
        return finetune.HeldOut(self.config, self.check, lambda each: any(text.strip() for text in each.texts))

    def open_streams(self) -> dict[str, SampleStream]:
        finetune.check_finetune(self.config)
        return finetune.stream_of(self.training, self.config)

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        return self.held_out.places()

    def check(self, example: Example) -> None:
        finetune.need(example, "captioning")

    def check_labelled(self, example: Example) -> None:
        finetune.need(example, "captioning", texts=True)

    def describe(self, model: nn.Module) -> str:
        return finetune.describe_finetune(model, self.config, f"beam of {self.config.beam_size}")

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        image = finetune.prepare_image(sample.image, self.config, rng, training)
        texts = [text for text in sample.texts if text.strip()]
        if not training:
            meta = sample.meta
            return {"image": image, "id": meta["id"], "image_id": meta["image_id"], "references": texts}
        target = finetune.prepare_text(texts[rng.integers(len(texts))], self.config, self.tokenizer)
        masked = hide_words(len(target), self.config.mask_ratio, rng)
        text = corrupt(target, masked, self.tokenizer, rng)
        return {"image": image, "text": text, "text_target": target, "text_masked": masked}

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        part = inputs["examples"]
        return {"words": int(part["text_masked"].sum()), "micro_batches": 1}

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        """Cross-entropy with the released code's label smoothing, which spreads it over the *other* words."""
        part = inputs["examples"]
        out = model(
            part["image"], part["text"], text_padding=part["text_padding"], text_at=part["text_at"],
            text_masked=part["text_masked"], text_masked_at=part["text_masked_at"],
        )  # fmt: skip
        targets, vocab_size = targets_at(part["text_target"], part["text_masked_at"]), out.logits.shape[1]
        smoothing = self.config.label_smoothing * vocab_size / (vocab_size - 1)
        smoothed = F.cross_entropy(out.logits.float(), targets, reduction="sum", label_smoothing=min(smoothing, 1.0))
        right = (out.logits.argmax(-1) == targets).sum() / num_targets["words"]
        auxiliary, terms = finetune.auxiliary_loss(out.routings, self.config, num_targets["micro_batches"])
        words = smoothed / num_targets["words"]
        return TaskLoss(words + auxiliary, {"words": words.detach(), "accuracy": right, **terms})

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        pass

    def captions(self, model: nn.Module, image: Tensor) -> list[str]:
        """Of pictures [B, 3, H, W], as `prepare` makes them."""
        assert isinstance(model, CaptioningModel)
        tokenizer, c = self.tokenizer, self.config
        found = generate_captions(
            model, image, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, mask_id=tokenizer.mask_id,
            beam_size=c.beam_size, max_length=c.model.max_text_length, length_penalty=c.length_penalty,
        )  # fmt: skip
        return [tokenizer.decode(ids) for ids in found.tokens.tolist()]

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        part = inputs["examples"]
        known = zip(part["id"], part["image_id"], part["references"], strict=True)
        return [
            {"id": key, "image_id": image_id, "references": references, "caption": caption}
            for (key, image_id, references), caption in zip(known, self.captions(model, part["image"]), strict=True)
        ]

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        """CIDEr-D, BLEU and ROUGE-L times 100, as papers print them; none where no picture has a reference."""
        references: dict[Any, list[str]] = defaultdict(list)
        for each in self.held_out.in_order(predictions):
            references[each["image_id"]] += each["references"]
        scored = {image_id: texts for image_id, texts in references.items() if texts}
        if not scored:
            return {}
        captions = self._caption_of(predictions)
        found = caption_scores(scored, {image_id: captions[image_id] for image_id in scored})
        return {name: 100 * value for name, value in found.items()}

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """COCO's results format: [{"image_id", "caption"}]."""
        captions = self._caption_of(predictions).items()
        rows = [{"image_id": image_id, "caption": caption} for image_id, caption in captions]
        return {"captions.json": json.dumps(rows, ensure_ascii=False, indent=0)}

    def _caption_of(self, predictions: list[dict[str, Any]]) -> dict[Any, str]:
        """Of each picture, in order; rows of an index file that name the same picture are one picture."""
        return {each["image_id"]: each["caption"] for each in self.held_out.in_order(predictions)}


def hide_words(length: int, ratio: float, rng: np.random.Generator) -> Bool[Tensor, " length"]:
    """True for round(ratio * length) tokens, at least one, of those after <s>."""
    count = min(max(1, int(ratio * length + 0.5)), length - 1)
    masked = torch.zeros(length, dtype=torch.bool)
    masked[1 + rng.permutation(length - 1)[:count]] = True
    return masked


def corrupt(
    target: Int[Tensor, " length"], masked: Bool[Tensor, " length"], tokenizer: Tokenizer, rng: np.random.Generator
) -> Int[Tensor, " length"]:
    """What the model reads in place of the hidden tokens; <s>, </s> and <pad> never stand for another token."""
    text, never = target.clone(), sorted((tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id))
    for place in masked.nonzero().flatten().tolist():
        draw = rng.random()
        if draw < MASKED:
            text[place] = tokenizer.mask_id
        elif draw < MASKED + REPLACED:
            drawn = int(rng.integers(tokenizer.vocab_size - len(never)))
            for special in never:
                drawn += drawn >= special
            text[place] = drawn
    return text
