"""Self-attention over the packed sequence.  Axes: B samples, S positions, d width, a attention heads."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlmoe.nn.kernels import attends_in_parts
from vlmoe.nn.multiway import Multiway, NormLinear, Parts, Stream, cut, join
from vlmoe.nn.packing import Packing

Visible = Bool[Tensor, "#B 1 #S S"] | Float[Tensor, "#B 1 #S S"]


class Attention(nn.Module):
    """Pre-norm attention with Magneto's second norm before the output projection (arXiv:2210.06423).

    Scores are joint over all positions, whatever the copies are.

    Args:
        dim: d, a multiple of `attn_heads`.
        attn_heads: a.
        copies: copies of projections and norms: per modality (released BEiT-3) or shared (the paper), see `Multiway`.
    """

    def __init__(self, dim: int, attn_heads: int, *, copies: Sequence[str]) -> None:
        super().__init__()
        if dim % attn_heads:
            raise ValueError(f"dim {dim} is not divisible by attn_heads {attn_heads}")
        self.attn_heads = attn_heads
        self.qkv = Multiway(lambda: NormLinear(dim, 3 * dim), copies=copies)  # rows: queries, keys, values
        self.out = Multiway(lambda: NormLinear(dim, dim), copies=copies)

    def forward(self, stream: Stream, visible: Visible | None, packing: Packing | None = None) -> tuple[Parts, Parts]:
        """Returns the residual stream's sum, and the output that is to be added to it.

        `visible` is True where a row may attend to a column, or 0 where another is -inf; None: everywhere but at the
        padding that `packing`, which says how the text is packed, leaves out."""
        x, qkv = self.qkv.add_norm(stream)
        sees_all = visible is None and (packing is not None or "text" not in qkv)
        if sees_all and attends_in_parts(next(iter(qkv.values())), self.attn_heads):
            return x, self.out(attend_in_parts(qkv, packing, self.attn_heads))
        if packing is not None:
            qkv["text"] = packing.unpack(qkv["text"])
            if visible is None:
                visible = packing.visible(qkv["vision"].shape[1] if "vision" in qkv else 0)
                if visible.is_cuda:
                    visible = as_bias(visible, qkv["text"].dtype)
        q, k, v = split_heads(join(qkv), self.attn_heads)
        # On CPUs the fused kernel gains nothing at our lengths, and the plain form rounds as the released models do.
        attend = plain_attention if q.device.type == "cpu" else F.scaled_dot_product_attention
        y = cut(attend(q, k, v, visible).transpose(1, 2).flatten(2), qkv)
        if packing is not None:
            y["text"] = packing.pack(y["text"])
        return x, self.out(y)


def attend_in_parts(qkv: Parts, packing: Packing | None, attn_heads: int) -> Parts:
    """Attention over all positions of a sample, by kernels that find them where they lie: vision [B, V, 3 d], and text packed.

    Returns:
        [B, V, d] and [1, N, d]; fillers of the packing are zeros.
    """
    from vlmoe.nn.kernels.attention_ops import attend_parts

    like = next(iter(qkv.values()))
    vision = qkv.get("vision")
    if packing is None:
        spans, length = torch.zeros(len(like), 2, dtype=torch.int32, device=like.device), 0
    else:
        spans, length = packing.spans, packing.rows.shape[1]
    if vision is None:
        vision = like.new_empty(len(spans), 0, like.shape[-1])
    text = qkv.get("text", like.new_empty(1, 0, like.shape[-1]))
    of_vision, of_text, _ = attend_parts(vision, text, spans, attn_heads, vision.shape[1] + length)
    return {name: of_vision if name == "vision" else of_text for name in qkv}


def as_bias(visible: Bool[Tensor, "#B 1 #S S"], dtype: torch.dtype) -> Float[Tensor, "#B 1 #S S"]:
    """0 where a row may attend to a column, else -inf. Rows begin at multiples of 16 bytes: with others cuDNN's forward takes
    twice the time (torch makes such a bias of a mask). They are never dense, so that compiled blocks meet one layout only."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return F.pad(bias, (0, 16 - visible.shape[-1] % 8))[..., : visible.shape[-1]]


def split_heads(
    qkv: Float[Tensor, "B S three_d"], attn_heads: int
) -> tuple[Float[Tensor, "B a S d_head"], Float[Tensor, "B a S d_head"], Float[Tensor, "B a S d_head"]]:
    """Queries, keys and values of each head, from the three projections side by side."""
    q, k, v = qkv.unflatten(-1, (3, attn_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def plain_attention(
    q: Float[Tensor, "B a S d_head"],
    k: Float[Tensor, "B a S d_head"],
    v: Float[Tensor, "B a S d_head"],
    visible: Bool[Tensor, "#B 1 #S S"] | None = None,
) -> Float[Tensor, "B a S d_head"]:
    """softmax(q k^T / sqrt(d_head)) v, operation for operation as in torchscale 0.3.0, on which BEiT-3 stands."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v
