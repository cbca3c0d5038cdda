"""The experts' kernels as `torch.library` operators with gradients, so that a compiled model stays one graph.

Axes: `rows` of width `dim` with `top_k` slots each; `slots` = rows * top_k; `experts`; `hidden`.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from vlmoe.nn.kernels import configs, has_known_gluon, suits_hopper
from vlmoe.nn.kernels import expert_mlp as forward_kernels
from vlmoe.nn.kernels import expert_mlp_backward as backward_kernels
from vlmoe.nn.kernels.launch import launch, launch_by_name
from vlmoe.nn.kernels.operator import aligned, operator, refuse_second_order
from vlmoe.nn.kernels.tiles import Tiles, cdiv, cut, find_tiles, multiprocessors, new_tiles, power_of_two

BANK = ("w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")  # as kernels name what an expert has


@operator
def expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [rows, dim] = sum over each row's slots of weight * f(row), and the `Tiles`, for the backward pass; `order` and `ends`
    are those of `order_slots`."""
    x, expert_ids, weights = aligned(x), expert_ids.contiguous(), weights.contiguous()
    E, hidden, dim = w_in.shape
    tiles = find_tiles(ends, expert_ids.numel(), configs.tile_slots(dim))
    y, count = x.new_empty(expert_ids.numel(), dim), len(tiles.expert)
    bank = (w_in, w_out, w_gate, b_in, b_out, b_gate)
    arguments = _by_name(x, weights, order, ends, tiles, bank, activation) | {"y": y}
    hopper_tile = configs.hopper_forward_tile(dim, hidden) if _runs_on_hopper(x, activation) else None
    if hopper_tile is not None:
        _hopper("hopper_forward").launch_forward(hopper_tile, min(count, multiprocessors(x.device)), arguments)
    else:
        tile = configs.forward_tile(dim, w_gate is not None)
        arguments |= {"BLOCK_N": tile.block_n, "STAGES": tile.stages}
        launch_by_name(forward_kernels.forward, (count,), arguments, num_warps=tile.warps)
    return _sum_slots(y, expert_ids, E), tiles.expert, tiles.place, tiles.base


@torch.library.register_fake(expert_mlp)
def _(
    x: Tensor, expert_ids: Tensor, weights: Tensor, order: Tensor, ends: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = new_tiles(ends, expert_ids.shape[0] * expert_ids.shape[1], configs.tile_slots(x.shape[1]))
    return torch.empty_like(x, memory_format=torch.contiguous_format), tiles.expert, tiles.place, tiles.base


@operator
def expert_mlp_backward(
    dy: Tensor,
    tile_expert: Tensor,
    tile_place: Tensor,
    tile_base: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    activation: str,
) -> list[Tensor]:
    """Gradients of x, weights, w_in, w_out, then w_gate, then b_in, b_out and b_gate, as far as these are there."""
    dy, x, expert_ids, weights = aligned(dy), aligned(x), expert_ids.contiguous(), weights.contiguous()
    E, hidden, dim = w_in.shape
    bias, slots = b_in is not None, expert_ids.numel()
    hopper_tile = configs.hopper_row_gradients_tile(dim, hidden) if _runs_on_hopper(x, activation) else None
    tiles = Tiles(tile_expert, tile_place, tile_base)
    dx_slots, dweights = x.new_empty(slots, dim), torch.zeros_like(weights)
    db_parts_per_tile = 1 if hopper_tile is None else 2
    db_out_parts = weights.new_empty(len(tile_expert) * db_parts_per_tile if bias else 0, dim)
    arguments = _by_name(x, weights, order, ends, tiles, (w_in, w_out, w_gate, b_in, b_out, b_gate), activation)
    arguments |= {"dy": dy, "dx": dx_slots, "dweights": dweights, "bias_parts": db_out_parts}
    if hopper_tile is None:
        dw_in, dw_out, dw_gate, db_in, db_gate = _backward_in_chunks(arguments, tiles, w_gate is not None)
    else:
        dw_in, dw_out, db_in = _backward_on_hopper(arguments, tiles, hopper_tile)
        dw_gate = db_gate = None
    gradients = [_sum_slots(dx_slots, expert_ids, E), dweights, dw_in, dw_out, dw_gate]
    if bias:
        db_out = x.new_empty(E, dim)
        grid = (E, cdiv(dim, 32))
        launch(backward_kernels.sum_tiles, grid, db_out_parts, db_out, tile_base, dim, db_parts_per_tile, 64, 32)
        gradients += [db_in, db_out, db_gate]
    return [each for each in gradients if each is not None]


def _backward_in_chunks(arguments: dict[str, Any], tiles: Tiles, gated: bool) -> tuple[Tensor | None, ...]:
    """Gradients of rows into `arguments`' tensors; returns those of w_in, w_out, w_gate, b_in and b_gate."""
    x, w_in = arguments["x"], arguments["w_in"]
    E, hidden, dim = w_in.shape
    matrices, bias = 3 if gated else 2, arguments["BIAS"]
    by_row, by_weight = configs.row_gradients_tile(dim, gated), configs.weight_gradients_tile(dim)
    blocks = cdiv(hidden, by_weight.block_f)
    block_m, total = arguments["BLOCK_M"], len(tiles.expert)
    chunk, segment, places = cut(tiles, block_m * hidden * matrices * x.element_size(), blocks * matrices, x.device)
    chunk_rows, size = chunk * block_m, hidden * dim
    weights = arguments["weights"]
    parts, dw = weights.new_empty(matrices, places, size + hidden), weights.new_zeros(matrices, E, size + hidden)
    arguments = arguments | {
        "hiddens": x.new_empty(matrices, chunk_rows, hidden), "gathered": x.new_empty(2, chunk_rows, dim),
        "chunk_rows": chunk_rows, "parts": parts, "total": dw, "segment_tiles": segment, "PLACES": places,
    }  # fmt: skip
    row_shape = {"BLOCK_N": by_row.block_n, "STAGES": by_row.stages}
    weight_shape = {"BLOCK_F": by_weight.block_f, "BLOCK_K": by_weight.block_k, "STAGES": by_weight.stages}
    sum_shape = {"SIZE": size + hidden if bias else size, "STRIDE": size + hidden, "BLOCK": 4096}
    for first in range(0, total, chunk):
        count = min(chunk, total - first)
        arguments |= {"first_tile": first, "num_tiles": count}
        launch_by_name(backward_kernels.row_gradients, (count,), arguments | row_shape, num_warps=by_row.warps)
        grid = (blocks, matrices, cdiv(count, segment))
        launch_by_name(backward_kernels.weight_gradients, grid, arguments | weight_shape, num_warps=by_weight.warps)
        launch_by_name(
            backward_kernels.reduce_segments, (cdiv(size + hidden, 4096), E, matrices), arguments | sum_shape
        )
    del arguments, parts  # before more is allocated
    narrow = functools.partial(Tensor.to, dtype=x.dtype, memory_format=torch.contiguous_format)
    dw, db = dw[:, :, :size].view(matrices, E, hidden, dim), dw[:, :, size:]
    dw_gate = narrow(dw[2]) if gated else None
    db_in, db_gate = (narrow(db[0]), narrow(db[2]) if gated else None) if bias else (None, None)
    return narrow(dw[0]), narrow(dw[1].transpose(1, 2)), dw_gate, db_in, db_gate


def _backward_on_hopper(
    arguments: dict[str, Any], tiles: Tiles, by_row: configs.HopperTile
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one pass, the hidden layer made twice and kept nowhere; returns gradients of w_in, w_out and b_in."""
    x, w_in = arguments["x"], arguments["w_in"]
    E, hidden, dim = w_in.shape
    by_weight = configs.hopper_weight_gradients_tile(dim)
    blocks, processors = hidden // by_weight.block_f, multiprocessors(x.device)
    segments = configs.segments(blocks, processors)
    count, places, new = len(tiles.expert), segments + E, arguments["weights"].new_empty
    dw_in, dw_out, db_in = torch.empty_like(w_in), x.new_empty(E, dim, hidden), x.new_empty(E, hidden)
    arguments = arguments | {
        "tile_weights": new(count * arguments["BLOCK_M"]), "parts": new(2, places, hidden * dim + hidden),
        "num_tiles": count, "PLACES": places, "segment_tiles": cdiv(count, segments),
        **_hopper("hopper").describe_weights(w_in, arguments["w_out"], by_row.block_n),
    }  # fmt: skip
    _hopper("hopper").launch_row_gradients(by_row, min(count, processors), arguments)
    _hopper("hopper_weights").launch_weight_gradients(by_weight, (blocks, segments), arguments)
    launch(
        backward_kernels.finish_segments, (cdiv(hidden, 64) * cdiv(dim, 64), E, 2), arguments["parts"], tiles.base,
        dw_in, dw_out, db_in, arguments["segment_tiles"], places, hidden, dim, arguments["BIAS"], 64, 64,
    )  # fmt: skip
    return dw_in, dw_out, db_in


@torch.library.register_fake(expert_mlp_backward)
def _(
    dy: Tensor, tile_expert: Tensor, tile_place: Tensor, tile_base: Tensor, x: Tensor, expert_ids: Tensor,
    weights: Tensor, order: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None,
    b_out: Tensor | None, w_gate: Tensor | None, b_gate: Tensor | None, activation: str,
) -> list[Tensor]:  # fmt: skip
    like = [x, weights, w_in, w_out, w_gate, b_in, b_out, b_gate if b_in is not None else None]
    return [torch.empty_like(each, memory_format=torch.contiguous_format) for each in like if each is not None]


def _save_expert_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation = inputs
    _, *tiles = output
    ctx.save_for_backward(*tiles, *tensors)
    ctx.mark_non_differentiable(*tiles)


def _expert_mlp_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_second_order()
    saved = ctx.saved_tensors  # once: checkpointing recomputes at the first access and refuses a second
    b_in, b_out, w_gate, b_gate = saved[10:]
    left = iter(expert_mlp_backward(dy, *saved, ctx.activation))
    dx, dweights, dw_in, dw_out = (next(left) for _ in range(4))
    dw_gate, db_in, db_out, db_gate = (None if each is None else next(left) for each in (w_gate, b_in, b_out, b_gate))
    return dx, None, dweights, None, None, dw_in, dw_out, db_in, db_out, dw_gate, db_gate, None


torch.library.register_autograd(expert_mlp, _expert_mlp_gradient, setup_context=_save_expert_mlp)


def _sum_slots(y: Tensor, expert_ids: Tensor, E: int) -> Tensor:
    rows, top_k = expert_ids.shape
    out = y.new_empty(rows, y.shape[1])
    width = power_of_two(y.shape[1])
    block = max(1, 4096 // width)
    launch(
        forward_kernels.sum_slots, (cdiv(rows, block),), y, expert_ids, out, rows, E,
        TOP_K=top_k, DIM=y.shape[1], WIDTH=width, BLOCK=block,
    )  # fmt: skip
    return out


def _by_name(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    tiles: Tiles,
    bank: tuple[Tensor | None, ...],
    activation: str,
) -> dict[str, Any]:
    """What kernels of both passes are told, by the names of their parameters. A part of the bank that is not there is never
    read, and `w_in` stands in its place."""
    w_in, b_in = bank[0], bank[3]
    assert w_in is not None
    E, hidden, dim = w_in.shape
    return {
        "x": x, "weights": weights, "slots": order, "ends": ends, "tile_expert": tiles.expert, "tile_place": tiles.place,
        "tile_base": tiles.base, **{name: aligned(w_in if w is None else w) for name, w in zip(BANK, bank, strict=True)},
        "E": E, "TOP_K": weights.shape[1], "HIDDEN": hidden, **configs.widths(dim), "BIAS": b_in is not None,
        "ACTIVATION": activation, "BLOCK_M": configs.tile_slots(dim),
    }  # fmt: skip


def _runs_on_hopper(x: Tensor, activation: str) -> bool:
    """Whether the kernels of `hopper` can run here."""
    return suits_hopper(x, activation) and has_known_gluon()


@functools.cache  # the import system takes 5 us to find a module that is there
def _hopper(module: str) -> Any:
    return importlib.import_module(f"vlmoe.nn.kernels.{module}")  # not at the top: it needs Gluon
