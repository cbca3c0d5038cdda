"""Slots in expert order, and back, without atomics and without a host sync.

Axes: `rows` with `top_k` slots each; `slots` = rows * top_k, and slot s belongs to row s // top_k; `experts`.
A slot whose expert id is `experts` has no expert. Such slots sort last, into the tail behind the last expert's end;
there a tensor in expert order may hold uninitialised memory, so nothing here lets it through.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class SlotOrder:
    slots: Int[Tensor, " slots"]  # which slot stands at each place of the expert order; -1: none (`block_order`)
    places: Int[Tensor, "rows top_k"]  # at which place each slot stands
    expert_ids: Int[Tensor, " slots"]  # of the slot at each place, ascending
    ends: Int[Tensor, " experts"]  # int32: the place behind the last slot of each expert

    @property
    def sizes(self) -> Int[Tensor, " experts"]:
        """int32: slots of each expert."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


def order_slots(expert_ids: Int[Tensor, "rows top_k"], num_experts: int) -> SlotOrder:
    """Sort slots by expert; slots of one expert keep their order."""
    sorted_ids, slots = expert_ids.flatten().to(torch.int32).sort(stable=True)
    places = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    each = torch.arange(num_experts, dtype=torch.int32, device=slots.device)
    ends = torch.searchsorted(sorted_ids, each, right=True, out_int32=True)
    return SlotOrder(slots, places.view(expert_ids.shape), sorted_ids, ends)


def num_blocks(sizes: Int[Tensor, " experts"], capacity: int) -> Int[Tensor, " experts"]:
    """Blocks of `capacity` places that hold an expert's slots; one at least."""
    return ((sizes + capacity - 1) // capacity).clamp(min=1)


def block_order(order: SlotOrder, capacity: int) -> tuple[SlotOrder, Int[Tensor, " blocks"]]:
    """The same order in blocks of `capacity` places, each of one expert, and the expert of each block.

    An expert has one block, or as many as its slots fill; the last may have places without a slot. Rows in this order
    are one [blocks, capacity, dim] tensor. The number of blocks is rounded up to a multiple of 8 where some expert has
    several, so that few shapes occur. Waits for the device to learn it.
    """
    num_experts, num_slots, device = len(order.ends), len(order.slots), order.slots.device
    ends = order.ends.long()
    starts = torch.cat([ends.new_zeros(1), ends])  # the last one is that of the tail
    blocks = num_blocks(order.sizes.long(), capacity)
    experts = torch.repeat_interleave(torch.arange(num_experts, device=device), blocks)
    used, first = len(experts), blocks.cumsum(0) - blocks
    experts = F.pad(experts, (0, 0 if used == num_experts else -used % 8))
    within = (torch.arange(len(experts), device=device) - first[experts]) * capacity
    within = torch.where(torch.arange(len(experts), device=device) < used, within, num_slots)  # padding holds no slot
    old = (starts[experts] + within)[:, None] + torch.arange(capacity, device=device)
    slots = torch.where(old < ends[experts][:, None], order.slots[old.clamp(max=num_slots - 1)], -1)
    num_places = len(experts) * capacity
    ids = order.expert_ids.long()
    new = torch.cat([first * capacity, first.new_full((1,), num_places)])[ids]
    new = new + torch.arange(num_slots, device=device) - starts[ids]
    return SlotOrder(
        slots=slots.flatten(),
        places=new.index_select(0, order.places.flatten()).view(order.places.shape),
        expert_ids=experts.repeat_interleave(capacity),
        ends=torch.tensor([num_places], dtype=torch.int32, device=device),
    ), experts


def dispatch(x: Float[Tensor, "rows dim"], order: SlotOrder) -> Float[Tensor, "slots dim"]:
    """The row of each slot, in expert order. The tail of the incoming gradient is never read."""
    return _Dispatch.apply(x, order.slots, order.places, order.ends)


def combine(
    y: Float[Tensor, "slots dim"], weights: Float[Tensor, "rows top_k"], order: SlotOrder
) -> Float[Tensor, "rows dim"]:
    """Weighted sum over each row's slots, accumulated in the dtype of `weights`. The tail of `y` is never read."""
    return _Combine.apply(y, weights, order.slots, order.places, order.ends)


def _sum_by_row(in_order: Tensor, places: Tensor, ends: Tensor, weights: Tensor | None = None) -> Tensor:
    """[slots, dim] in expert order -> [rows, dim]: the (weighted) sum over a row's slots that have an expert, accumulated in
    float32 (float64)."""
    has_none = places >= ends[-1]
    if in_order.device.type == "cpu" and not torch.compiler.is_compiling() and not has_none.any():
        return _bags(in_order, places, weights)
    by_row = in_order.index_select(0, places.flatten().clamp(max=len(in_order) - 1))
    by_row = by_row.view(*places.shape, in_order.shape[1]).masked_fill_(has_none[..., None], 0)
    return (by_row if weights is None else by_row * weights[..., None]).sum(1).to(in_order.dtype)


def _bags(table: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    """(Weighted) sums of rows of a table in one pass on a CPU. Its operator takes weights in the dtype of the table only: those
    of 16 bits come as two terms, so that their sum is nearly that of float32."""
    if weights is not None and weights.dtype != table.dtype:
        high = weights.to(table.dtype)
        weights = torch.cat([high, (weights - high).to(table.dtype)], 1)
        indices = torch.cat([indices, indices], 1)
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, slots: Tensor, places: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(places, ends)
        return x.index_select(0, slots.clamp(min=0) // places.shape[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grad_outputs
        places, ends = ctx.saved_tensors
        return _sum_by_row(grad, places, ends), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, weights: Tensor, slots: Tensor, places: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, slots, places, ends)
        return _sum_by_row(y, places, ends, weights)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grad_outputs
        y, weights, slots, places, ends = ctx.saved_tensors
        held = slots.clamp(min=0)
        slot_weights = torch.where(slots >= 0, weights.flatten().index_select(0, held), 0)
        rows = held // places.shape[1]
        grads = grad.index_select(0, rows)
        if grad.device.type == "cpu" and not torch.compiler.is_compiling():
            grad_y = _bags(grad, rows[:, None], slot_weights[:, None])
            dots = (y * grads).sum(-1).to(weights.dtype)
        else:
            grad_y = (grads * slot_weights[:, None]).to(y.dtype)
            dots = (y * grads.to(weights.dtype)).sum(-1)
        dots = dots.index_select(0, places.flatten().clamp(max=len(y) - 1)).view(places.shape)
        return grad_y, dots.masked_fill_(places >= ends[-1], 0), None, None, None
