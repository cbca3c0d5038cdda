"""Task `pretrain`: masked data modelling on images, texts and image-text pairs (BEiT-3, arXiv 2208.10442, section 2.2).

One objective, cross-entropy at masked positions: words of the text, and codes of a frozen visual tokenizer for the image.
A term of the loss is named `<stream>_<what is predicted>`: texts_text (mlm), images_image (mim), pairs_text and
pairs_image (mvlm). Each is a mean over its own masked positions; the paper does not state their weights, so each stream has
`weight` (1.0).
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.config import PretrainConfig
from vlmoe.data import SamplePlace, SampleStream, open_held_out, open_streams
from vlmoe.data.masking import block_mask, text_mask
from vlmoe.data.sample import BrokenSample, Sample
from vlmoe.data.text import load_tokenizer, tokenizer_digest
from vlmoe.data.transforms import eval_transform, train_transform
from vlmoe.errors import UserError
from vlmoe.metrics.perplexity import perplexity, unigram_perplexity
from vlmoe.models.build import build_encoder, check_model
from vlmoe.models.cost import describe_model
from vlmoe.models.heads import PretrainModel, targets_at
from vlmoe.models.visual_tokenizer import VisualTokenizer, load_visual_tokenizer
from vlmoe.models.weights import weights_digest
from vlmoe.nn.router import Routing, load_balancing_loss, router_z_loss
from vlmoe.tasks.start import TOKENIZER_FILE, VISUAL_TOKENIZER_FILE, start_encoder, start_heads
from vlmoe.tasks.task import Inputs, TaskLoss, Totals


class Pretrain:
    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, data = config, config.data
        self.streams = tuple(name for name in ("images", "texts", "pairs") if getattr(data, name).batch_size)
        if not self.streams:
            raise UserError(
                "task pretrain needs a stream: set data.pairs.batch_size (or data.images / data.texts) above 0"
            )
        check_model(config.model)
        self.tokenizer = load_tokenizer(data.text)
        self.files = {TOKENIZER_FILE: tokenizer_digest(data.text)}
        self.pad_id, self.max_text_length = self.tokenizer.pad_id, config.model.max_text_length
        self.grid = config.model.image_size // config.model.patch_size
        if self.streams != ("texts",) and not round(config.image_mask_ratio * self.grid**2):
            raise UserError(
                f"image_mask_ratio {config.image_mask_ratio:g} hides none of the {self.grid**2} patches of an image: raise it"
            )
        self.codes_of = _load_codes_of(config).to(device) if self.streams != ("texts",) else None
        if self.codes_of and config.visual_tokenizer:
            self.files[VISUAL_TOKENIZER_FILE] = weights_digest(Path(config.visual_tokenizer))

    def build_model(self) -> PretrainModel:
        encoder = build_encoder(self.config.model, self.tokenizer.vocab_size)
        return PretrainModel(encoder, self.tokenizer.vocab_size, self.num_codes)

    @property
    def num_codes(self) -> int:
        return self.codes_of.num_codes if self.codes_of else 0

    def start(self, model: nn.Module) -> None:
        assert isinstance(model, PretrainModel)
        start_encoder(model.encoder, self.config, self.tokenizer.vocab_size)
        start_heads(model, self.config)

    def open_streams(self) -> dict[str, SampleStream]:
        return open_streams(self.config.data, self.streams, seed=self.config.seed)

    def open_held_out(self) -> dict[str, Sequence[SamplePlace]]:
        return open_held_out(self.config.data, self.streams)

    def describe(self, model: nn.Module) -> str:
        about = describe_model(self.config.model, self.tokenizer.vocab_size, self.num_codes)
        return f"{about}\nstarting from {self.config.init}" if self.config.init else about

    def prepare(self, sample: Sample, stream: str, rng: np.random.Generator, training: bool) -> dict[str, Any]:
        c, tensors = self.config, {}
        if stream != "texts":
            assert sample.image is not None
            if training:
                tensors["image"] = train_transform(
                    sample.image, rng, image_size=c.model.image_size, **vars(c.data.transform)
                )
            else:
                tensors["image"] = eval_transform(sample.image, image_size=c.model.image_size)
            num_masked = round(c.image_mask_ratio * self.grid**2)
            tensors["image_masked"] = torch.from_numpy(block_mask(self.grid, num_masked, rng))
        if stream != "images":
            text = sample.texts[rng.integers(len(sample.texts))]
            ids = self.tokenizer.encode_with_specials(text, c.model.max_text_length)
            if len(ids) <= 2:
                raise BrokenSample("empty text")
            ratio = c.pair_text_mask_ratio if stream == "pairs" else c.text_mask_ratio
            tensors["text"] = torch.tensor(ids)
            tensors["text_masked"] = torch.from_numpy(text_mask(len(ids), ratio, rng))
        return tensors

    def num_targets(self, inputs: Inputs) -> dict[str, int]:
        masked = {
            f"{stream}_{what}": int(part[f"{what}_masked"].sum())
            for stream, part in inputs.items()
            for what in ("text", "image")
            if f"{what}_masked" in part
        }
        return {**masked, "micro_batches": 1}

    def loss(self, model: nn.Module, inputs: Inputs, num_targets: Totals) -> TaskLoss:
        assert isinstance(model, PretrainModel)
        total, metrics = torch.zeros((), device=next(model.parameters()).device), {}
        routings: dict[str, list[Routing]] = defaultdict(list)
        for stream, part in inputs.items():
            out = self._forward(model, part)
            for what, (logits, targets) in self._predictions(out, part).items():
                term = f"{stream}_{what}"
                loss = model.loss(logits, targets) / num_targets[term]
                total = total + getattr(self.config.data, stream).weight * loss
                metrics[term] = loss.detach()
            for layer, routing in out.routings.items():
                routings[layer].append(routing)
        if routings:
            balance = _sum_over_layers(routings, load_balancing_loss) / num_targets["micro_batches"]
            z = _sum_over_layers(routings, router_z_loss) / num_targets["micro_batches"]
            total = total + self.config.load_balancing * balance + self.config.router_z * z
            metrics |= {"load_balancing": balance.detach() / len(routings), "router_z": z.detach() / len(routings)}
        return TaskLoss(total, metrics)

    def after_step(self, model: nn.Module, states: list[Any]) -> None:
        pass

    def predict(self, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
        """One record per stream: sums of the negative log-likelihood, counts of the targets, slots per expert."""
        records = []
        for stream, part in inputs.items():
            out = self._forward(model, part)
            terms = {
                f"{stream}_{what}": _summary(logits, targets)
                for what, (logits, targets) in self._predictions(out, part).items()
            }
            if stream == "pairs" and len(part["image"]) > 1:  # one picture has no other to stand in its place
                swapped = self._forward(model, {**part, "image": part["image"].roll(1, 0)})
                text, targets = self._predictions(swapped, part)["text"]
                terms["pairs_text_image_shuffled"] = _summary(text, targets)
            records.append({"terms": terms, "loads": {name: each.load.cpu() for name, each in out.routings.items()}})
        return records

    def score(self, predictions: list[dict[str, Any]]) -> dict[str, float]:
        terms: dict[str, dict[str, Any]] = {}
        loads: dict[str, Tensor] = {}
        for record in predictions:
            for name, summary in record["terms"].items():
                sums = terms.setdefault(name, dict.fromkeys(summary, 0))
                terms[name] = {key: sums[key] + value for key, value in summary.items()}
            for name, load in record["loads"].items():
                loads[name] = loads.get(name, torch.zeros_like(load)) + load
        figures: dict[str, float] = {}
        for name, each in sorted(terms.items()):
            figures[f"{name}/loss"] = each["nll"] / each["n"]
            figures[f"{name}/perplexity"] = perplexity(each["nll"], each["n"])
            figures[f"{name}/unigram_perplexity"] = unigram_perplexity(each["targets"].numpy())
            figures[f"{name}/accuracy"] = each["right"] / each["n"]
        for name, load in sorted(loads.items()):
            share = load.double() / load.sum()
            figures[f"experts/{name}/in_use"] = float((load > 0).sum())
            figures[f"experts/{name}/max_load"] = float(share.max() * len(load))
            figures[f"experts/{name}/min_load"] = float(share.min() * len(load))
        return figures

    def prediction_files(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        return {}

    def _forward(self, model: nn.Module, part: dict[str, Tensor]) -> Any:
        text = part["text"].masked_fill(part["text_masked"], self.tokenizer.mask_id) if "text" in part else None
        return model(
            part.get("image"),
            text,
            text_padding=part.get("text_padding"),
            text_at=part.get("text_at"),
            image_masked=part.get("image_masked"),
            text_masked=part.get("text_masked"),
            image_masked_at=part.get("image_masked_at"),
            text_masked_at=part.get("text_masked_at"),
        )

    def _predictions(self, out: Any, part: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """What is predicted -> logits at its masked positions, and the right answers (-100: no position)."""
        found = {}
        if "text" in part:
            found["text"] = out.text_logits, targets_at(part["text"], part["text_masked_at"])
        if "image" in part:
            assert self.codes_of is not None
            with torch.no_grad(), torch.autocast(part["image"].device.type, enabled=False):
                codes = self.codes_of.encode(part["image"])
            found["image"] = out.image_logits, targets_at(codes, part["image_masked_at"])
        return found


def _load_codes_of(config: PretrainConfig) -> VisualTokenizer:
    if config.visual_tokenizer is None:
        raise UserError(
            "visual_tokenizer is not set: train one (vlmoe train recipes/visual_tokenizer/tiny.yaml) and name its run folder"
        )
    try:
        codes_of = load_visual_tokenizer(Path(config.visual_tokenizer))
    except UserError as error:
        raise UserError(f"visual_tokenizer: {error}") from None
    for key in ("image_size", "patch_size"):
        own, its = getattr(config.model, key), getattr(codes_of, key)
        if own != its:
            raise UserError(
                f"model.{key} is {own}, but the visual tokenizer {config.visual_tokenizer} was trained at {its}; "
                f"set model.{key}={its} or train another tokenizer"
            )
    return codes_of


def _sum_over_layers(routings: dict[str, list[Routing]], loss: Any) -> Tensor:
    """Sum over expert banks of the mean over the streams that passed the bank."""
    return torch.stack([torch.stack([loss(each) for each in bank]).mean() for bank in routings.values()]).sum()


def _summary(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    logits, targets = logits[targets >= 0], targets[targets >= 0]
    return {
        "n": len(targets),
        "nll": float(F.cross_entropy(logits.float(), targets, reduction="sum")),
        "right": int((logits.argmax(-1) == targets).sum()),
        "targets": torch.bincount(targets, minlength=logits.shape[1]).cpu(),
    }
