"""The multiway encoder: one packed sequence [vision CLS, patches | text] through joint attention.

Axes: B samples, P patches, L text positions, S = (1 + P) + L positions of the packed sequence, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import DropPath
from torch import Tensor, nn

from vlmoe.nn.attention import Attention
from vlmoe.nn.embed import TextEmbed, VisionEmbed
from vlmoe.nn.multiway import Multiway, MultiwayFFN
from vlmoe.nn.router import Routing


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder says.

    Attributes:
        states: of the last layer, [B, S, d]; those at padding carry no meaning.
        routings: of the sparse layers that this input passed, named "layers.1.vision", "layers.1.text", "layers.1.vl",
            or "layers.1" for a bank that both modalities share.
        num_vision: positions of [vision CLS, patches], which come first; 0 without an image.
    """

    states: Float[Tensor, "B S d"]
    routings: dict[str, Routing]
    num_vision: int


class Block(nn.Module):
    """A pre-norm Transformer block: attention, then feed-forward, each with its residual and drop path."""

    def __init__(self, attention: Attention, ffn: MultiwayFFN, *, drop_path: float) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "B S d"],
        num_vision: int,
        visible: Bool[Tensor, "#B 1 #S S"] | None,
        is_padding: Bool[Tensor, "B S"] | None,
    ) -> tuple[Float[Tensor, "B S d"], dict[str, Routing]]:
        x = x + self.drop_path(self.attention(x, num_vision, visible))
        y, routings = self.ffn(x, num_vision, is_padding)
        return x + self.drop_path(y), routings


class Encoder(nn.Module):
    """BEiT-3's encoder; `vlmoe.models.build_encoder` puts one together.

    Args:
        vision_embed, text_embed: the two ways into the packed sequence.
        layers: the blocks, lowest first.
        norm: after the last block; None: states leave as they are (released VQA and ImageNet models).
    """

    def __init__(
        self, *, vision_embed: VisionEmbed, text_embed: TextEmbed, layers: Sequence[Block], norm: Multiway | None
    ) -> None:
        super().__init__()
        self.vision_embed = vision_embed
        self.text_embed = text_embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    @property
    def dim(self) -> int:
        return self.text_embed.tokens.embedding_dim

    def forward(
        self,
        image: Float[Tensor, "B 3 H W"] | None = None,
        text: Int[Tensor, "B L"] | None = None,
        *,
        text_padding: Bool[Tensor, "B L"] | None = None,
        image_masked: Bool[Tensor, "B P"] | None = None,
        blocked: Bool[Tensor, "*#B S S"] | None = None,
    ) -> EncoderOutput:
        """Image alone, text alone, or a pair.

        Args:
            image: pixels in [-1, 1].
            text: token ids.
            text_padding: True = not a token: nothing attends to it, and no expert sees it.
            image_masked: True = the patch is replaced by the mask token.
            blocked: True = the row's position may not attend to the column's.

        Raises:
            ValueError: neither image nor text; an image or a text of a size that the position tables do not cover.
        """
        parts: list[Tensor] = []
        if image is not None:
            parts.append(self.vision_embed(image, image_masked))
        num_vision = parts[0].shape[1] if parts else 0
        is_padding = None
        if text is not None:
            parts.append(self.text_embed(text))
            if text_padding is not None:
                is_padding = F.pad(text_padding, (num_vision, 0), value=False)
        if not parts:
            raise ValueError("the encoder needs an image, a text, or both")
        x = torch.cat(parts, dim=1)
        visible = _visible(is_padding, blocked)
        routings: dict[str, Routing] = {}
        for index, layer in enumerate(self.layers):
            x, used = layer(x, num_vision, visible, is_padding)
            for name, routing in used.items():
                routings[f"layers.{index}" if name == "shared" else f"layers.{index}.{name}"] = routing
        if self.norm is not None:
            x = self.norm(x, num_vision)
        return EncoderOutput(x, routings, num_vision)


def _visible(
    is_padding: Bool[Tensor, "B S"] | None, blocked: Bool[Tensor, "*#B S S"] | None
) -> Bool[Tensor, "#B 1 #S S"] | None:
    """The one attention mask of a forward pass: True where a row may attend to a column; None: everywhere."""
    columns = None if is_padding is None else ~is_padding[:, None, None, :]
    if blocked is None:
        return columns
    allowed = ~blocked[None, None] if blocked.dim() == 2 else ~blocked[:, None]
    return allowed if columns is None else allowed & columns
