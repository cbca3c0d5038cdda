"""The multiway encoder: one packed sequence [vision CLS, patches | text] through joint attention.

Axes: B samples, P patches, L text positions, S = (1 + P) + L positions of the packed sequence, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmoe.nn.attention import Attention, Visible, as_bias
from vlmoe.nn.embed import TextEmbed, VisionEmbed
from vlmoe.nn.kernels import product_dtype
from vlmoe.nn.multiway import PER_MODALITY, Multiway, MultiwayFFN, Parts, Stream, join
from vlmoe.nn.packing import Packing, packing
from vlmoe.nn.router import Routing


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder says.

    Attributes:
        parts: states of the last layer by modality, "vision" [B, 1 + P, d] and "text" [B, L, d]; those at padding carry no
            meaning.
        routings: of the sparse layers that this input passed, named "layers.1.vision", "layers.1.text", "layers.1.vl",
            or "layers.1" for a bank that both modalities share.
    """

    parts: Parts
    routings: dict[str, Routing]

    @property
    def states(self) -> Float[Tensor, "B S d"]:
        """Of the packed sequence."""
        return join(self.parts)

    @property
    def num_vision(self) -> int:
        """Positions of [vision CLS, patches], which come first; 0 without an image."""
        return self.parts["vision"].shape[1] if "vision" in self.parts else 0


class Block(nn.Module):
    """A pre-norm Transformer block: attention, then feed-forward, each with its residual."""

    def __init__(self, attention: Attention, ffn: MultiwayFFN) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = ffn

    def forward(
        self,
        stream: Stream,
        visible: Visible | None = None,
        is_padding: Bool[Tensor, "B S"] | None = None,
        packed: Packing | None = None,
        drop_path: Parts | None = None,
    ) -> tuple[Stream, dict[str, Routing]]:
        """
        Args:
            stream: the sequence; its text packed as `packed` says, where that is given.
            visible: of all positions, packed or not, or None; see `Attention`.
            is_padding: True = no token; of the text as it comes.
            drop_path: [2, B, 1, 1] for each part: what the outputs of attention and feed-forward are multiplied by.
        """
        x, y = self.attention(stream, visible, packed)
        x, y, routings = self.ffn(Stream(x, y, _row(drop_path, 0)), is_padding)
        return Stream(x, y, _row(drop_path, 1)), routings


def _row(parts: Parts | None, index: int) -> Parts | None:
    return None if parts is None else {name: part[index] for name, part in parts.items()}


class Encoder(nn.Module):
    """BEiT-3's encoder; `vlmoe.models.build_encoder` puts one together.

    Args:
        vision_embed, text_embed: the two ways into the packed sequence.
        layers: the blocks, lowest first.
        norm: after the last block; None: states leave as they are (released VQA and ImageNet models).
        drop_path: of the last layer, in training; it grows linearly from 0 (BEiT, arXiv:2106.08254).
    """

    def __init__(
        self,
        *,
        vision_embed: VisionEmbed,
        text_embed: TextEmbed,
        layers: Sequence[Block],
        norm: Multiway | None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.vision_embed = vision_embed
        self.text_embed = text_embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.drop_path = drop_path
        copies = {name for module in self.modules() if isinstance(module, Multiway) for name in module.copies}
        self.can_pack = copies == set(PER_MODALITY)

    @property
    def dim(self) -> int:
        return self.text_embed.tokens.embedding_dim

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"] | None = None,
        text: Int[Tensor, "B L"] | None = None,
        *,
        text_padding: Bool[Tensor, "B L"] | None = None,
        text_at: Int[Tensor, " N"] | None = None,
        image_masked: Bool[Tensor, "B P"] | None = None,
        blocked: Bool[Tensor, "*#B S S"] | None = None,
    ) -> EncoderOutput:
        """Image alone, text alone, or a pair.

        Args:
            image: pixels in [-1, 1].
            text: token ids.
            text_padding: True = not a token: nothing attends to it, and no expert sees it.
            text_at: where `text_padding` is False, as `collate` gives it: then padding passes nothing but the attention, where
                no module is shared by both modalities. Routings of text are then those of the packed rows.
            image_masked: True = the patch is replaced by the mask token.
            blocked: True = the row's position may not attend to the column's.

        Raises:
            ValueError: neither image nor text; an image or a text of a size that the position tables do not cover.
        """
        x: Parts = {}
        if image is not None:
            x["vision"] = self.vision_embed(image, image_masked)
        num_vision = x["vision"].shape[1] if x else 0
        is_padding, packed = None, None
        if text is not None:
            x["text"] = self.text_embed(text)
            if text_padding is not None:
                is_padding = F.pad(text_padding, (num_vision, 0), value=False)
        if not x:
            raise ValueError("the encoder needs an image, a text, or both")
        any_part = next(iter(x.values()))
        if text_at is not None and text_padding is not None and self.can_pack:
            packed = packing(text_at, text_padding)
        visible = None if packed is not None and blocked is None else _visible(is_padding, blocked)
        if visible is not None and visible.is_cuda:
            visible = as_bias(visible, product_dtype(any_part))
        routings: dict[str, Routing] = {}
        drop_path: Parts | None = None
        if self.training and self.drop_path:
            drop_path = dict.fromkeys(x, drop_paths(any_part, len(self.layers), self.drop_path))
        if packed is not None:
            is_padding, x["text"] = (packed.at < 0)[None], packed.pack(x["text"])
            if drop_path is not None:
                drop_path["text"] = packed.spread(drop_path["text"])
        stream = Stream(x)
        for index, layer in enumerate(self.layers):
            stream, used = layer(stream, visible, is_padding, packed, _row(drop_path, index))
            for name, routing in used.items():
                routings[f"layers.{index}" if name == "shared" else f"layers.{index}.{name}"] = routing
        x = stream.total() if self.norm is None else self.norm(stream.total())
        if packed is not None:
            x["text"] = packed.unpack(x["text"])
        return EncoderOutput(x, routings)


def drop_paths(x: Float[Tensor, "B S d"], depth: int, last_rate: float) -> Float[Tensor, "depth 2 B 1 1"]:
    """Stochastic depth (arXiv:1603.09382) of all layers, drawn at once: a sample skips each of the two parts of layer i
    with chance i / (depth - 1) of `last_rate`; where it does not, the part is scaled up, so that its mean stays."""
    rates = torch.linspace(0, last_rate, depth, device=x.device)[:, None, None, None, None]
    kept = torch.rand(depth, 2, len(x), 1, 1, device=x.device) >= rates
    return torch.where(kept, 1 / (1 - rates), 0).to(x.dtype)


def _visible(
    is_padding: Bool[Tensor, "B S"] | None, blocked: Bool[Tensor, "*#B S S"] | None
) -> Bool[Tensor, "#B 1 #S S"] | None:
    """The one attention mask of a forward pass: True where a row may attend to a column; None: everywhere."""
    columns = None if is_padding is None else ~is_padding[:, None, None, :]
    if blocked is None:
        return columns
    allowed = ~blocked[None, None] if blocked.dim() == 2 else ~blocked[:, None]
    return allowed if columns is None else allowed & columns
