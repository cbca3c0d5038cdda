"""Text without its padding: what passes row by row need not pass what is no token.

Axes: B texts of L positions each, N packed rows (their tokens, text after text, and some fillers), d width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Packing(NamedTuple):
    """Where each token lies in a padded batch, and in a packed one."""

    at: Int[Tensor, " N"]  # the place in the padded batch, counted text by text; -1: a filler
    rows: Int[Tensor, "B L"]  # the packed row; -1: padding
    spans: Int[Tensor, "B 2"]  # int32: the packed rows of each text, the first one and that behind the last one

    def pack(self, x: Float[Tensor, "B L d"]) -> Float[Tensor, "1 N d"]:
        """Fillers are zeros."""
        return _Take.apply(x.flatten(0, 1), self.at, self.rows.flatten())[None]

    def unpack(self, x: Float[Tensor, "1 N d"]) -> Float[Tensor, "B L d"]:
        """Padding is zeros."""
        return _Take.apply(x[0], self.rows.flatten(), self.at).unflatten(0, self.rows.shape)

    def visible(self, num_vision: int) -> Bool[Tensor, "B 1 1 S"]:
        """True where a position of a sequence, padded text behind vision, is a token."""
        return F.pad(self.rows >= 0, (num_vision, 0), value=True)[:, None, None]

    def spread(self, by_text: Float[Tensor, "*any B 1 1"]) -> Float[Tensor, "*any 1 N 1"]:
        """What each text has, for each of its tokens (fillers: something)."""
        text = self.at.clamp(min=0) // self.rows.shape[1]
        return by_text.flatten(-3).index_select(-1, text)[..., None, :, None]


def packing(text_at: Int[Tensor, " N"], text_padding: Bool[Tensor, "B L"]) -> Packing:
    """`text_at`: the places that are no padding, in order, and fillers (-1), none within a text; `collate` makes it."""
    places = text_padding.numel()
    rows = text_at.new_full((places + 1,), -1)  # fillers write to a place behind the last one
    rows[torch.where(text_at < 0, places, text_at)] = torch.arange(len(text_at), device=text_at.device)
    rows = rows[:places].view_as(text_padding)
    ends = rows.amax(1) + 1
    return Packing(text_at, rows, torch.stack([ends - (rows >= 0).sum(1), ends], 1).to(torch.int32))


class _Take(torch.autograd.Function):
    """y[i] = x[index[i]], 0 where index is -1; `inverse` says for each row of x where it went (-1: nowhere). So the gradient
    is taken in the same way, while that of torch's indexing would be summed up by atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return _take(dy, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return torch.where(index[:, None] >= 0, x[index.clamp(min=0)], 0)
