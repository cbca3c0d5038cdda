# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes plain values where the kernel's signature says constexpr)
"""Bias, GELU and layer norm as one `torch.library` operator with gradients."""

from typing import Any

import torch
from torch import Tensor

from vlmoe.nn.kernels import norm
from vlmoe.nn.kernels.tiles import multiprocessors, power_of_two


@torch.library.custom_op("vlmoe::gelu_norm", mutates_args=())
def gelu_norm(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm(GELU(x [rows, dim] + shift)) in x's dtype, and each row's mean and 1 / standard deviation in float32."""
    x, shift, weight, bias = (each.contiguous() for each in (x, shift, weight, bias))
    y, means, scales = _new(x)
    norm.gelu_norm[(_programs(x, 8),)](x, shift, weight, bias, y, means, scales, len(x), eps, **_constants(x))
    return y, means, scales


@gelu_norm.register_fake
def _(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _new(x)


@torch.library.custom_op("vlmoe::gelu_norm_backward", mutates_args=())
def gelu_norm_backward(
    dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, means: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and [3, dim] in float32: those of shift, weight and bias."""
    dy, x, shift, weight = (each.contiguous() for each in (dy, x, shift, weight))
    dx, programs = torch.empty_like(x), _programs(x, 2)
    parts = means.new_empty(programs, 3, x.shape[1])
    norm.gelu_norm_gradients[(programs,)](dy, x, shift, weight, means, scales, dx, parts, len(x), **_constants(x))
    return dx, parts.sum(0)


@gelu_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), means.new_empty(3, x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, bias, _ = inputs
    _, means, scales = output
    ctx.save_for_backward(*tensors, means, scales)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(means, scales)


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, (dshift, dweight, dbias) = gelu_norm_backward(dy, *saved)
    return dx, dshift.to(saved[1].dtype), dweight.to(saved[2].dtype), dbias.to(ctx.bias_dtype), None


gelu_norm.register_autograd(_gradients, setup_context=_save)


def _new(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_row = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), by_row, torch.empty_like(by_row)


def _constants(x: Tensor) -> dict[str, int]:
    width = power_of_two(x.shape[1])
    return {"DIM": x.shape[1], "WIDTH": width, "num_warps": max(4, width // 1024)}  # an H100's best at 3,072 columns


def _programs(x: Tensor, per_processor: int) -> int:
    return max(1, min(len(x), per_processor * multiprocessors(x.device)))
