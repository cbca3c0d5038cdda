"""Residual sum and layer norm, and bias, GELU and layer norm, as `torch.library` operators with gradients."""

from typing import Any

import torch
from torch import Tensor

from vlmoe.nn.kernels import norm
from vlmoe.nn.kernels.launch import launch
from vlmoe.nn.kernels.operator import operator, refuse_second_order
from vlmoe.nn.kernels.tiles import persistent_programs, power_of_two

ADD_PROGRAMS = 8  # of `add_norm` and its gradients, per multiprocessor: an H200's best, with one warp


@operator
def gelu_norm(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """layer_norm(GELU(x [rows, dim] + shift)) in x's dtype, and each row's mean and 1 / standard deviation in float32."""
    x, shift, weight, bias = (each.contiguous() for each in (x, shift, weight, bias))
    y, means, scales = _new(x)
    programs = persistent_programs(len(x), 8, x.device)
    launch(norm.gelu_norm, (programs,), x, shift, weight, bias, y, means, scales, len(x), eps, **_constants(x))
    return y, means, scales


@torch.library.register_fake(gelu_norm)
def _(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _new(x)


@operator
def gelu_norm_backward(
    dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, means: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and [3, dim] in float32: those of shift, weight and bias."""
    dy, x, shift, weight = (each.contiguous() for each in (dy, x, shift, weight))
    dx, programs = torch.empty_like(x), persistent_programs(len(x), 2, x.device)
    parts = means.new_empty(programs, 3, x.shape[1])
    launch(
        norm.gelu_norm_gradients, (programs,), dy, x, shift, weight, means, scales, dx, parts, len(x), **_constants(x)
    )
    return dx, parts.sum(0)


@torch.library.register_fake(gelu_norm_backward)
def _(dy: Tensor, x: Tensor, shift: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), means.new_empty(3, x.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, bias, _ = inputs
    _, means, scales = output
    ctx.save_for_backward(*tensors, means, scales)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(means, scales)


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    saved = ctx.saved_tensors
    dx, (dshift, dweight, dbias) = gelu_norm_backward(dy, *saved)
    return dx, dshift.to(saved[1].dtype), dweight.to(saved[2].dtype), dbias.to(ctx.bias_dtype), None


torch.library.register_autograd(gelu_norm, _gradients, setup_context=_save)


@operator
def add_norm(
    x: Tensor, y: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + y * factor in x's dtype (empty without y), its layer norm in `dtype`, and each row's mean and 1 / standard
    deviation in float32.

    Args:
        x, y: [rows, dim].
        factor: [n], each for rows / n rows, one after another.
    """
    x, weight, bias = (each.contiguous() for each in (x, weight, bias))
    y, factor = (each if each is None else each.contiguous() for each in (y, factor))
    total, normed, means, scales = _new_sum(x, y, dtype)
    launch(
        norm.add_norm, (persistent_programs(len(x), ADD_PROGRAMS, x.device),), x, y, factor, weight, bias, total,
        normed, means, scales, len(x), _rows_per(factor, x), eps,
        **_sum_constants(x, y, factor),
    )  # fmt: skip
    return total, normed, means, scales


@torch.library.register_fake(add_norm)
def _(
    x: Tensor, y: Tensor | None, factor: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_sum(x, y, dtype)


@operator
def add_norm_backward(
    d_normed: Tensor, d_total: Tensor | None, total: Tensor, factor: Tensor | None, weight: Tensor, means: Tensor,
    scales: Tensor, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of y (empty if nothing was added: no `d_total`), and [2, dim] in float32, those of weight and bias."""
    d_normed, total, weight = (each.contiguous() for each in (d_normed, total, weight))
    d_total, factor = (each if each is None else each.contiguous() for each in (d_total, factor))
    dx, dy = _new_gradients(total, d_total, y_dtype)
    parts = means.new_empty(persistent_programs(len(total), ADD_PROGRAMS, total.device), 2, total.shape[1])
    launch(
        norm.add_norm_gradients, (len(parts),), d_normed, d_total, total, factor, weight, means, scales, dx, dy, parts,
        len(total), _rows_per(factor, total),
        **_sum_constants(total, d_total, factor),
    )  # fmt: skip
    return dx, dy, parts.sum(0)


@torch.library.register_fake(add_norm_backward)
def _(
    d_normed: Tensor, d_total: Tensor | None, total: Tensor, factor: Tensor | None, weight: Tensor, means: Tensor,
    scales: Tensor, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return *_new_gradients(total, d_total, y_dtype), means.new_empty(2, total.shape[1])


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, factor, weight, bias, _, _ = inputs
    total, _, means, scales = output
    ctx.save_for_backward(x if y is None else total, factor, weight, means, scales)
    ctx.y_dtype, ctx.bias_dtype = None if y is None else y.dtype, bias.dtype
    ctx.mark_non_differentiable(means, scales)


def _sum_gradients(ctx: Any, d_total: Tensor, d_normed: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    total, factor, weight, means, scales = ctx.saved_tensors
    adds = ctx.y_dtype is not None
    dx, dy, (dweight, dbias) = add_norm_backward(
        d_normed, d_total if adds else None, total, factor, weight, means, scales, ctx.y_dtype or total.dtype
    )
    return dx, dy if adds else None, None, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None


torch.library.register_autograd(add_norm, _sum_gradients, setup_context=_save_sum)


def _new(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    by_row = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), by_row, torch.empty_like(by_row)


def _constants(x: Tensor) -> dict[str, int]:
    width = power_of_two(x.shape[1])
    return {"DIM": x.shape[1], "WIDTH": width, "num_warps": max(4, width // 1024)}  # an H100's best at 3,072 columns


def _new_sum(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(0 if y is None else x.shape), *_new(x, dtype)


def _new_gradients(total: Tensor, d_total: Tensor | None, y_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), total.new_empty(0 if d_total is None else total.shape, dtype=y_dtype)


def _rows_per(factor: Tensor | None, x: Tensor) -> int:
    return 1 if factor is None else len(x) // max(1, len(factor))


def _sum_constants(x: Tensor, added: Tensor | None, factor: Tensor | None) -> dict[str, int | bool]:
    constants = _constants(x)
    tile = {"ROWS": max(1, 2048 // constants["WIDTH"]), "num_warps": max(1, constants["WIDTH"] // 1024)}
    return constants | tile | {"ADDS": added is not None, "FACTORS": factor is not None}
