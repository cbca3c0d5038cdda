# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes plain values where the kernel's signature says constexpr)
"""GELU and layer norm as one `torch.library` operator with gradients."""

from typing import Any

import torch
from torch import Tensor

from vlmoe.nn.kernels import norm
from vlmoe.nn.kernels.tiles import multiprocessors, power_of_two


@torch.library.custom_op("vlmoe::gelu_norm", mutates_args=())
def gelu_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm(GELU(x [rows, dim])) in x's dtype, and each row's mean and 1 / standard deviation in float32."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y, means, scales = _new(x)
    norm.gelu_norm[(_programs(x, 8),)](x, weight, bias, y, means, scales, len(x), eps, **_constants(x))
    return y, means, scales


@gelu_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _new(x)


@torch.library.custom_op("vlmoe::gelu_norm_backward", mutates_args=())
def gelu_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx, programs = torch.empty_like(x), _programs(x, 2)
    parts = means.new_empty(programs, 2, x.shape[1])
    norm.gelu_norm_gradients[(programs,)](dy, x, weight, means, scales, dx, parts, len(x), **_constants(x))
    dweight, dbias = parts.sum(0).to(weight.dtype).unbind()
    return dx, dweight.clone(), dbias.clone()


@gelu_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    _, means, scales = output
    ctx.save_for_backward(x, weight, means, scales)
    ctx.mark_non_differentiable(means, scales)


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    return *gelu_norm_backward(dy, *ctx.saved_tensors), None


gelu_norm.register_autograd(_gradients, setup_context=_save)


def _new(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_row = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), by_row, torch.empty_like(by_row)


def _constants(x: Tensor) -> dict[str, int]:
    width = power_of_two(x.shape[1])
    return {"DIM": x.shape[1], "WIDTH": width, "num_warps": max(4, width // 1024)}  # an H100's best at 3,072 columns


def _programs(x: Tensor, per_processor: int) -> int:
    return max(1, min(len(x), per_processor * multiprocessors(x.device)))
