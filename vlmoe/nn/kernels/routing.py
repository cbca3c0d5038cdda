# type: ignore  # kernels are Triton's language, which checkers read as Python
"""Routing: softmax and top-k of the logits in one kernel; a stable counting sort of slots by expert.

Axes: `rows` of `E` logits; `slots` = rows * top_k; EXPERTS is E rounded up to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def store_top_k(z, probs, expert_ids, row, rows, E, TOP_K: tl.constexpr, EXPERTS: tl.constexpr):
    """Of logits [BLOCK, EXPERTS] the TOP_K largest of each row, best first, ties to the lower expert, and their softmax
    probabilities."""
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = row < rows
    free = inside[:, None] & (expert < E)
    best = tl.max(tl.where(free, z, -float("inf")), 1)
    total = tl.sum(tl.where(free, tl.exp(z - best[:, None]), 0.0), 1)
    for j in tl.static_range(TOP_K):
        top = tl.max(tl.where(free, z, -float("inf")), 1)
        chosen = tl.min(tl.where(free & (z == top[:, None]), expert, E - 1), 1)  # E - 1: rows of NaN stay in bounds
        free = free & (expert != chosen[:, None])
        tl.store(probs + row * TOP_K + j, tl.exp(top - best) / total, mask=inside)
        tl.store(expert_ids + row * TOP_K + j, chosen.to(tl.int64), mask=inside)


@triton.jit
def logit_gradients(logits, expert_ids, dprobs, row, rows, E, TOP_K: tl.constexpr, EXPERTS: tl.constexpr):
    """p (g - sum p g) [BLOCK, EXPERTS], with g the gradients of the chosen probabilities and 0 elsewhere; 0 in the padding."""
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = row < rows
    real = inside[:, None] & (expert < E)
    z = tl.load(logits + row[:, None] * E + expert, mask=real, other=-float("inf"))
    p = tl.where(real, tl.exp(z - tl.max(z, 1)[:, None]), 0.0)
    p = tl.where(real, p / tl.sum(p, 1)[:, None], 0.0)
    g = tl.zeros_like(p)
    for j in tl.static_range(TOP_K):
        chosen = tl.load(expert_ids + row * TOP_K + j, mask=inside, other=0)
        grad = tl.load(dprobs + row * TOP_K + j, mask=inside, other=0.0)
        g = tl.where(expert == chosen[:, None], grad[:, None], g)
    return p * (g - tl.sum(p * g, 1)[:, None])


@triton.jit
def top_k_softmax(logits, probs, expert_ids, rows, E, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)[None, :]
    z = tl.load(logits + row[:, None] * E + expert, mask=(row < rows)[:, None] & (expert < E), other=-float("inf"))
    store_top_k(z, probs, expert_ids, row, rows, E, TOP_K, EXPERTS)


@triton.jit
def top_k_softmax_backward(
    logits, expert_ids, dprobs, dlogits, rows, E, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)[None, :]
    grad = logit_gradients(logits, expert_ids, dprobs, row, rows, E, TOP_K, EXPERTS)
    tl.store(dlogits + row[:, None] * E + expert, grad, mask=(row < rows)[:, None] & (expert < E))


@triton.jit
def count_slots(expert_ids, counts, slots, E, blocks, EXPERTS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr):
    """counts[expert, block]: slots of each expert in each block of STEP * STEPS slots."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    count = tl.zeros([EXPERTS], tl.int32)
    for step in range(STEPS):
        slot = (block * STEPS + step) * STEP + tl.arange(0, STEP)
        chosen = tl.load(expert_ids + slot, mask=slot < slots, other=E).to(tl.int32)
        count += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + expert * blocks + block, count, mask=expert < E)


@triton.jit
def place_slots(
    expert_ids, counts, behind, order, ends, slots, E, blocks,
    EXPERTS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """order[place] = slot, by expert and then by slot, and each expert's end; `behind` is the running sum of `counts`."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    real = expert < E
    at = expert * blocks + block
    end = tl.load(behind + at, mask=real, other=0)
    if block == blocks - 1:
        tl.store(ends + expert, end, mask=real)
    place = end - tl.load(counts + at, mask=real, other=0)
    for step in range(STEPS):
        slot = (block * STEPS + step) * STEP + tl.arange(0, STEP)
        chosen = tl.load(expert_ids + slot, mask=slot < slots, other=E).to(tl.int32)
        mine = ((chosen[:, None] == expert[None, :]) & real[None, :]).to(tl.int32)
        before = tl.cumsum(mine, 0) - mine
        tl.store(order + tl.sum(mine * (place[None, :] + before), 1), slot, mask=chosen < E)
        place += tl.sum(mine, 0)
