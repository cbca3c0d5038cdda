"""Attention over parts as one `torch.library` operator with gradients.

Axes: B samples, V vision positions each (0: none), N rows of packed text, d width, a heads.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vlmoe.nn.kernels import attention
from vlmoe.nn.kernels.launch import launch
from vlmoe.nn.kernels.operator import aligned, operator, refuse_second_order
from vlmoe.nn.kernels.tiles import cdiv

# an H200's best at 64 features and 200 positions
BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
KEYS = BLOCKS | {"maxnreg": 128}  # so that four programs fit a multiprocessor


@operator
def attend_parts(
    vision: Tensor, text: Tensor, spans: Tensor, heads: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sample over its positions of both parts.

    Args:
        vision, text: [B, V, 3 d] and [1, N, 3 d], queries, keys and values side by side.
        spans: int32 [B, 2], the rows of each sample's text: the first one, and that behind the last one.
        longest: positions of a sample at most.

    Returns:
        [B, V, d] and [1, N, d] (zeros in rows of no sample), and the logarithms (base 2) of the scores' sums, [a, B V + N].
    """
    vision, text, spans = (aligned(each) for each in (vision, text, spans))
    y_vision, y_text, sums = _new(vision, text, heads)
    grid, sizes = _launch(vision, spans, sums, longest)
    launch(attention.attend, grid, vision, text, spans, y_vision, y_text, sums, **sizes, **BLOCKS)
    return y_vision, y_text, sums


@torch.library.register_fake(attend_parts)
def _(vision: Tensor, text: Tensor, spans: Tensor, heads: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    return _new(vision, text, heads)


@operator
def attend_parts_backward(
    dy_vision: Tensor, dy_text: Tensor, vision: Tensor, text: Tensor, spans: Tensor, y_vision: Tensor, y_text: Tensor,
    sums: Tensor, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `vision` and `text`."""
    vision, text, spans, dy_vision, dy_text = (aligned(each) for each in (vision, text, spans, dy_vision, dy_text))
    d_vision, d_text, stats = torch.empty_like(vision), torch.zeros_like(text), sums.new_empty(*sums.shape, 4)
    grid, sizes = _launch(vision, spans, sums, longest)
    launch(
        attention.query_gradients, grid, vision, text, y_vision, y_text, dy_vision, dy_text, spans, sums, stats,
        d_vision, d_text, **sizes, **BLOCKS,
    )  # fmt: skip
    launch(
        attention.key_gradients, grid, vision, text, dy_vision, dy_text, spans, stats, d_vision, d_text, **sizes, **KEYS
    )
    return d_vision, d_text


@torch.library.register_fake(attend_parts_backward)
def _(
    dy_vision: Tensor, dy_text: Tensor, vision: Tensor, text: Tensor, spans: Tensor, y_vision: Tensor, y_text: Tensor,
    sums: Tensor, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return vision.new_empty(vision.shape), text.new_empty(text.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    vision, text, spans, _, ctx.longest = inputs
    ctx.save_for_backward(vision, text, spans, *output)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, dy_vision: Tensor, dy_text: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    d_vision, d_text = attend_parts_backward(dy_vision, dy_text, *ctx.saved_tensors, ctx.longest)
    return d_vision, d_text, None, None, None


torch.library.register_autograd(attend_parts, _gradients, setup_context=_save)


def _new(vision: Tensor, text: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    (B, V, width), N = vision.shape, text.shape[1]
    return (
        vision.new_empty(B, V, width // 3),
        text.new_zeros(1, N, width // 3),
        vision.new_empty(heads, B * V + N, dtype=torch.float32),
    )


def _launch(vision: Tensor, spans: Tensor, sums: Tensor, longest: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of all three kernels, and what they are told of sizes."""
    (B, V, width), (heads, rows) = vision.shape, sums.shape
    blocks, head_dim = cdiv(longest, BLOCKS["BLOCK_M"]), width // 3 // heads
    scale = head_dim**-0.5 / math.log(2)
    sizes = {"V": V, "rows": rows, "text_row": B * V, "blocks": blocks, "scale": scale, "HEADS": heads, "DIM": head_dim}
    return (blocks * heads * len(spans),), sizes
