"""Heads over an encoder: masked pretraining, and the tasks of the released fine-tuning models.

Axes: B samples (T texts in retrieval), P patches, L text positions, S positions of the packed sequence, d width.
Every task model is called in one way, `model(image=, text=, text_padding=, text_at=, image_b=, text_masked=)`; what its task
has no use for stays None, and `text_at` packs the texts (see `Encoder`). Heads have the module names of the released
checkpoints, and the layer norm eps (1e-5) of those.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmoe.models.encoder import Encoder, EncoderOutput
from vlmoe.nn.router import Routing


@dataclass(frozen=True)
class PretrainOutput(EncoderOutput):
    """An encoder's output, with the predictions at masked positions in row-major order (None: nothing was masked)."""

    text_logits: Float[Tensor, "masked_text vocab"] | None
    image_logits: Float[Tensor, "masked_patches codes"] | None


@dataclass(frozen=True)
class TaskOutput:
    logits: Float[Tensor, "rows classes"]
    routings: dict[str, Routing]


@dataclass(frozen=True)
class RetrievalOutput:
    """Embeddings of unit length; `logit_scale` (1 / temperature) multiplies their cosines in the contrastive loss.

    Routings are those of two passes, named "image.layers.1.vision" and "text.layers.1.text".
    """

    image_embedding: Float[Tensor, "B dim"] | None
    text_embedding: Float[Tensor, "T dim"] | None
    logit_scale: Float[Tensor, ""]
    routings: dict[str, Routing]


class PretrainModel(nn.Module):
    """Masked data modelling (BEiT-3, section 2.2): token ids at masked text, visual codes at masked patches."""

    def __init__(self, encoder: Encoder, vocab_size: int, num_codes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlm_head = _linear(encoder.dim, vocab_size)
        self.mim_head = _linear(encoder.dim, num_codes)
        self.loss = SummedCrossEntropy()

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"] | None = None,
        text: Int[Tensor, "B L"] | None = None,
        *,
        text_padding: Bool[Tensor, "B L"] | None = None,
        text_at: Int[Tensor, " N"] | None = None,
        image_masked: Bool[Tensor, "B P"] | None = None,
        text_masked: Bool[Tensor, "B L"] | None = None,
        image_masked_at: Int[Tensor, " masked_patches"] | None = None,
        text_masked_at: Int[Tensor, " masked_text"] | None = None,
    ) -> PretrainOutput:
        """`text` holds the mask id already; `text_masked` and `image_masked` (True = masked) say where to predict, and so does
        `*_masked_at`, where given: positions as of `vlmoe.data.batch.positions`, whose number no device is asked for."""
        out = self.encoder(image, text, text_padding=text_padding, text_at=text_at, image_masked=image_masked)
        text_logits, image_logits = None, None
        if text_masked is not None:
            text_logits = self.mlm_head(states_at(out.parts["text"], text_masked, text_masked_at))
        if image_masked is not None:
            image_logits = self.mim_head(states_at(out.parts["vision"][:, 1:], image_masked, image_masked_at))
        return PretrainOutput(out.parts, out.routings, text_logits, image_logits)


class SummedCrossEntropy(nn.Module):
    """In float32, over the rows whose target is not -100. A module, so that it can be compiled: the float32 copy of the logits
    is then never written."""

    def forward(self, logits: Float[Tensor, "rows classes"], targets: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits.float(), targets, reduction="sum")


class Pooler(nn.Module):
    """tanh(dense(norm(x)))"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dense = _linear(dim, dim)

    def forward(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B d"]:
        return torch.tanh(self.dense(self.norm(x)))


class VQAModel(nn.Module):
    """Question about an image -> scores of `num_answers` answers, from the vision CLS of the fused pass."""

    def __init__(self, encoder: Encoder, num_answers: int) -> None:
        super().__init__()
        dim = encoder.dim
        self.encoder = encoder
        self.pooler = Pooler(dim)
        self.head = nn.Sequential(
            _linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), _linear(2 * dim, num_answers)
        )

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        text: Int[Tensor, "B L"],
        *,
        text_padding: Bool[Tensor, "B L"] | None = None,
        text_at: Int[Tensor, " N"] | None = None,
        image_b: None = None,
        text_masked: None = None,
    ) -> TaskOutput:
        out = self.encoder(image, text, text_padding=text_padding, text_at=text_at)
        return TaskOutput(self.head(self.pooler(out.parts["vision"][:, 0])), out.routings)


class NLVR2Head(nn.Module):
    """Two-layer perceptron with norms before both layers, which start a thousand times smaller than others."""

    def __init__(self, in_dim: int, hidden_dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.dense1 = _linear(in_dim, hidden_dim, scale=1e-3)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.dense2 = _linear(hidden_dim, num_classes, scale=1e-3)

    def forward(self, x: Float[Tensor, "B in_dim"]) -> Float[Tensor, "B classes"]:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class NLVR2Model(nn.Module):
    """Is the sentence true of both images? Two fused passes, as one batch; each gives vision CLS and first token."""

    def __init__(self, encoder: Encoder, num_classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = NLVR2Head(4 * encoder.dim, 2 * encoder.dim, num_classes)

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        text: Int[Tensor, "B L"],
        *,
        image_b: Float[Tensor, "B 3 H W"],
        text_padding: Bool[Tensor, "B L"] | None = None,
        text_at: Int[Tensor, " N"] | None = None,
        text_masked: None = None,
    ) -> TaskOutput:
        padding = None if text_padding is None else text_padding.repeat(2, 1)
        at = None if text_at is None else torch.cat([text_at, torch.where(text_at < 0, -1, text_at + text.numel())])
        out = self.encoder(torch.cat([image, image_b]), text.repeat(2, 1), text_padding=padding, text_at=at)
        pooled = torch.cat([out.parts["vision"][:, 0], out.parts["text"][:, 0]], dim=-1)
        return TaskOutput(self.head(torch.cat(pooled.chunk(2), dim=-1)), out.routings)


class RetrievalModel(nn.Module):
    """Dual encoder: the first position of image alone and of text alone, projected and normalised."""

    def __init__(self, encoder: Encoder, embedding_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.vision_head = _linear(encoder.dim, embedding_dim, bias=False)
        self.language_head = _linear(encoder.dim, embedding_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # its logarithm, as in CLIP

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"] | None = None,
        text: Int[Tensor, "T L"] | None = None,
        *,
        text_padding: Bool[Tensor, "T L"] | None = None,
        text_at: Int[Tensor, " N"] | None = None,
        image_b: None = None,
        text_masked: None = None,
    ) -> RetrievalOutput:
        """Images and texts need not be equally many; either may be left out."""
        image_embedding, text_embedding, routings = None, None, {}
        if image is not None:
            out = self.encoder(image)
            image_embedding = F.normalize(self.vision_head(out.parts["vision"][:, 0]).float(), dim=-1)
            routings.update({f"image.{name}": routing for name, routing in out.routings.items()})
        if text is not None:
            out = self.encoder(text=text, text_padding=text_padding, text_at=text_at)
            text_embedding = F.normalize(self.language_head(out.parts["text"][:, 0]).float(), dim=-1)
            routings.update({f"text.{name}": routing for name, routing in out.routings.items()})
        return RetrievalOutput(image_embedding, text_embedding, self.logit_scale.exp(), routings)


class CaptioningModel(nn.Module):
    """Masked caption words from the image and the words before them (prefix language model)."""

    def __init__(self, encoder: Encoder, vocab_size: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlm_head = _linear(encoder.dim, vocab_size)

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        text: Int[Tensor, "B L"],
        *,
        text_masked: Bool[Tensor, "B L"],
        text_padding: Bool[Tensor, "B L"] | None = None,
        text_at: Int[Tensor, " N"] | None = None,
        image_b: None = None,
        text_masked_at: Int[Tensor, " masked"] | None = None,
    ) -> TaskOutput:
        """Logits [masked, vocab] at the positions of `text_masked` in row-major order, or at those of `text_masked_at`."""
        num_vision = 1 + self.encoder.vision_embed.num_patches
        blocked = prefix_lm_blocked(num_vision, text.shape[1], device=text.device)
        out = self.encoder(image, text, text_padding=text_padding, text_at=text_at, blocked=blocked)
        states = states_at(out.parts["text"], text_masked, text_masked_at)
        return TaskOutput(self.mlm_head(states), out.routings)


class ClassificationModel(nn.Module):
    """Image classification from the mean of the patch states."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc_norm = nn.LayerNorm(encoder.dim)
        self.head = _linear(encoder.dim, num_classes, scale=1e-3)

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"],
        text: None = None,
        *,
        text_padding: None = None,
        text_at: None = None,
        image_b: None = None,
        text_masked: None = None,
    ) -> TaskOutput:
        out = self.encoder(image)
        return TaskOutput(self.head(self.fc_norm(out.parts["vision"][:, 1:].mean(1))), out.routings)


def states_at(
    states: Float[Tensor, "B n d"], masked: Bool[Tensor, "B n"], at: Int[Tensor, " count"] | None
) -> Float[Tensor, "count d"]:
    """The states where the mask is True; with `at`, which says the same in positions, those there (some state at -1)."""
    return states[masked] if at is None else states.flatten(0, 1).index_select(0, at.clamp(min=0))


def targets_at(targets: Int[Tensor, "B n"], at: Int[Tensor, " count"]) -> Int[Tensor, " count"]:
    """The targets at positions, and -100, which cross-entropy leaves out, where the position is -1."""
    return torch.where(at < 0, -100, targets.flatten().index_select(0, at.clamp(min=0)))


def prefix_lm_blocked(num_vision: int, num_text: int, *, device: torch.device | None = None) -> Bool[Tensor, "S S"]:
    """True = may not attend: vision sees all vision and no text; text sees all vision and the text up to itself."""
    position = torch.arange(num_vision + num_text, device=device)
    return position[None, :] > position[:, None].clamp(min=num_vision - 1)


def _linear(in_dim: int, out_dim: int, *, bias: bool = True, scale: float = 1.0) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=0.02 * scale)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
