"""The kernels of gate, top-k and the order of slots as `torch.library` operators with gradients.

Axes: `rows` of width `dim` with `top_k` slots each; `slots` = rows * top_k; `experts`.
"""

from typing import Any

import torch
from torch import Tensor

from vlmoe.nn.kernels import configs, gate, routing
from vlmoe.nn.kernels.launch import launch
from vlmoe.nn.kernels.operator import operator, refuse_second_order
from vlmoe.nn.kernels.tiles import cdiv, persistent_programs, power_of_two


@operator
def top_k_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax probabilities (float32) and ids of the `top_k` largest of float32 logits [rows, experts], best first.

    Equal logits: the lower expert first.
    """
    logits = logits.contiguous()
    rows, E = logits.shape
    probs, ids = _new_top_k(logits, top_k)
    block, experts = _row_block(E)
    launch(routing.top_k_softmax, (cdiv(rows, block),), logits, probs, ids, rows, E, top_k, experts, block)
    return probs, ids


@torch.library.register_fake(top_k_softmax)
def _new_top_k(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@operator
def top_k_softmax_backward(logits: Tensor, expert_ids: Tensor, dprobs: Tensor) -> Tensor:
    logits, dprobs = logits.contiguous(), dprobs.contiguous()
    rows, E = logits.shape
    dlogits = torch.empty_like(logits)
    block, experts = _row_block(E)
    launch(
        routing.top_k_softmax_backward, (cdiv(rows, block),), logits, expert_ids, dprobs, dlogits, rows, E,
        expert_ids.shape[1], experts, block,
    )  # fmt: skip
    return dlogits


@torch.library.register_fake(top_k_softmax_backward)
def _(logits: Tensor, expert_ids: Tensor, dprobs: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_top_k(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _top_k_gradient(ctx: Any, dprobs: Tensor, dids: Tensor | None) -> tuple[Tensor, None]:
    refuse_second_order()
    logits, expert_ids = ctx.saved_tensors
    return top_k_softmax_backward(logits, expert_ids, dprobs), None


torch.library.register_autograd(top_k_softmax, _top_k_gradient, setup_context=_save_top_k)


class GateTopK(torch.autograd.Function):
    """The gate's logits [rows, experts] in float32, for 16-bit x [rows, dim] and weight [experts, dim]; the probabilities
    and ids that `top_k_softmax` takes from them; and x once more, for the experts: their gradient of it is then added by the
    kernel that makes the gate's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, probs, expert_ids = gate_top_k(x, weight, top_k)
        ctx.save_for_backward(x, weight, logits, expert_ids)
        ctx.mark_non_differentiable(expert_ids)
        ctx.set_materialize_grads(False)
        return logits, probs, expert_ids, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, Tensor, None]:
        refuse_second_order()
        dlogits, dprobs, _, drows = grad_outputs
        return *gate_top_k_backward(*ctx.saved_tensors, dlogits, dprobs, drows), None


@operator
def gate_top_k(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Without gradients: see `GateTopK`."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, dim, E = len(x), x.shape[1], len(weight)
    logits, probs, ids = _new_gate_top_k(x, weight, top_k)
    tile = configs.gate_top_k_tile(dim)
    launch(
        gate.gate_top_k, (_gate_programs(rows, tile, x.device),), x, weight, logits, probs, ids, rows, E, top_k,
        **_gate_constants(dim, E, tile), num_warps=tile.warps,
    )  # fmt: skip
    return logits, probs, ids


@torch.library.register_fake(gate_top_k)
def _new_gate_top_k(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    return logits, *_new_top_k(logits, top_k)


@operator
def gate_top_k_backward(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    dlogits: Tensor | None,
    dprobs: Tensor | None,
    drows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    x, weight = x.contiguous(), weight.contiguous()
    dprobs = logits.new_zeros(expert_ids.shape) if dprobs is None else dprobs.contiguous()
    adds_logits, adds_rows = dlogits is not None, drows is not None
    dlogits, drows = (like if each is None else each.contiguous() for each, like in ((dlogits, logits), (drows, x)))
    rows, dim, E = len(x), x.shape[1], len(weight)
    dx = torch.empty_like(x)
    tile = configs.gate_gradients_tile(dim)
    programs = _gate_programs(rows, tile, x.device)
    parts = logits.new_empty(programs, E, dim)
    launch(
        gate.gate_gradients, (programs,), x, weight, logits, expert_ids, dprobs, dlogits, drows, dx, parts, rows, E,
        expert_ids.shape[1], **_gate_constants(dim, E, tile), ADDS_LOGITS=adds_logits, ADDS_ROWS=adds_rows,
        num_warps=tile.warps,
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


@torch.library.register_fake(gate_top_k_backward)
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (x, weight))  # type: ignore


@operator
def order_slots(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots sorted by expert, stable, int32 [slots], and the place behind each expert's last slot, int32 [experts].

    Slots whose id is `num_experts` have no place: as many entries at the end are uninitialised.
    """
    expert_ids = expert_ids.contiguous()
    order, ends = _new_order(expert_ids, num_experts)
    counts, constants = _counts_by_block(expert_ids, num_experts)
    blocks = counts.shape[1]
    behind = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    launch(
        routing.place_slots, (blocks,), expert_ids, counts, behind, order, ends, expert_ids.numel(), num_experts, blocks,
        **constants,
    )  # fmt: skip
    return order, ends


@torch.library.register_fake(order_slots)
def _new_order(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    order = expert_ids.new_empty(expert_ids.shape[0] * expert_ids.shape[1], dtype=torch.int32)
    return order, expert_ids.new_empty(num_experts, dtype=torch.int32)


@operator
def count_slots(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Slots of each expert, int64 [experts]; those whose id is `num_experts` have none."""
    return _counts_by_block(expert_ids.contiguous(), num_experts)[0].sum(1)


@torch.library.register_fake(count_slots)
def _(expert_ids: Tensor, num_experts: int) -> Tensor:
    return expert_ids.new_empty(num_experts, dtype=torch.int64)


def _counts_by_block(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, dict[str, int]]:
    """[experts, blocks], and how slots are cut into blocks."""
    experts = power_of_two(num_experts)
    step = max(16, 4096 // experts)
    steps = max(1, 512 // step)
    blocks = max(1, cdiv(expert_ids.numel(), step * steps))
    counts = expert_ids.new_empty(num_experts, blocks, dtype=torch.int32)
    constants = {"EXPERTS": experts, "STEP": step, "STEPS": steps, "num_warps": 2}
    launch(routing.count_slots, (blocks,), expert_ids, counts, expert_ids.numel(), num_experts, blocks, **constants)
    return counts, constants


def _gate_programs(rows: int, tile: configs.GateTile, device: torch.device) -> int:
    return persistent_programs(cdiv(rows, tile.block), tile.programs, device)


def _gate_constants(dim: int, E: int, tile: configs.GateTile) -> dict[str, int]:
    return configs.widths(dim) | {"EXPERTS": max(16, power_of_two(E)), "BLOCK": tile.block, "STAGES": tile.stages}


def _row_block(E: int) -> tuple[int, int]:
    experts = power_of_two(E)
    return max(1, 4096 // experts), experts
