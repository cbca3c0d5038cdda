# type: ignore  # kernels are Triton's language, which checkers read as Python
"""The router's linear gate: 16-bit rows times float32 weights, as accurate as a product in float32, without a float32 row;
and the choice of experts, while the logits are on chip.

A float32 number is the sum of three bfloat16 ones (8 bits each), whose products with a bfloat16 are exact in float32; so
three products on the tensor cores give what one in float32 would.
Axes: `rows` of DIM = D1 + D2 columns (padded), `E` experts (EXPERTS, padded).
"""

import triton
import triton.language as tl

from vlmoe.nn.kernels.expert_mlp import load_rows, store_rows
from vlmoe.nn.kernels.routing import logit_gradients, store_top_k


@triton.jit
def parts_of(w, dtype: tl.constexpr):
    first = w.to(dtype)
    rest = w - first.to(tl.float32)
    second = rest.to(dtype)
    return first, second, (rest - second.to(tl.float32)).to(dtype)


@triton.jit
def load_weight(weight, expert, column, E, DIM: tl.constexpr):
    inside = (expert < E)[:, None] & (column < DIM)[None, :]
    return tl.load(weight + expert[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def times_parts(x, first, second, third, acc):
    """x [.., columns] @ (first + second + third)^T, small parts first."""
    acc = tl.dot(x, third.T, acc)
    acc = tl.dot(x, second.T, acc)
    return tl.dot(x, first.T, acc)


@triton.jit
def gate_top_k(
    x, weight, logits, probs, expert_ids, rows, E, TOP_K: tl.constexpr, DIM: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """logits [rows, E] = x @ weight^T, and what `store_top_k` takes from them."""
    FULL: tl.constexpr = D1 + D2 == DIM
    expert = tl.arange(0, EXPERTS)
    c1 = tl.arange(0, D1)
    first1, second1, third1 = parts_of(load_weight(weight, expert, c1, E, DIM), x.dtype.element_ty)
    if D2 > 0:
        c2 = D1 + tl.arange(0, D2)
        first2, second2, third2 = parts_of(load_weight(weight, expert, c2, E, DIM), x.dtype.element_ty)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0), num_stages=STAGES):
        row = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        acc = tl.zeros([BLOCK, EXPERTS], tl.float32)
        acc = times_parts(load_rows(x, row, row < rows, c1, FULL, DIM), first1, second1, third1, acc)
        if D2 > 0:
            acc = times_parts(load_rows(x, row, row < rows, c2, FULL, DIM), first2, second2, third2, acc)
        at = logits + row[:, None] * E + expert[None, :]
        tl.store(at, acc, mask=(row < rows)[:, None] & (expert < E)[None, :])
        store_top_k(acc, probs, expert_ids, row, rows, E, TOP_K, EXPERTS)


@triton.jit
def gate_gradients(
    x, weight, logits, expert_ids, dprobs, dlogits, drows, dx, parts, rows, E, TOP_K: tl.constexpr, DIM: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, EXPERTS: tl.constexpr, ADDS_LOGITS: tl.constexpr, ADDS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = g @ weight + drows, and this program's part [E, DIM] of weight's gradient, g^T @ x. Here g is the
    gradient of logits that the probabilities pass on, plus dlogits.

    dx leaves as 16-bit rows, so products of the two leading parts are enough for it.
    """
    FULL: tl.constexpr = D1 + D2 == DIM
    dtype: tl.constexpr = x.dtype.element_ty
    expert = tl.arange(0, EXPERTS)
    c1 = tl.arange(0, D1)
    first1, second1, _ = parts_of(load_weight(weight, expert, c1, E, DIM), dtype)
    acc1 = tl.zeros([D1, EXPERTS], tl.float32)
    if D2 > 0:
        c2 = D1 + tl.arange(0, D2)
        first2, second2, _ = parts_of(load_weight(weight, expert, c2, E, DIM), dtype)
        acc2 = tl.zeros([D2, EXPERTS], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0), num_stages=STAGES):
        row = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < rows
        g = logit_gradients(logits, expert_ids, dprobs, row, rows, E, TOP_K, EXPERTS)
        if ADDS_LOGITS:
            at = dlogits + row[:, None] * E + expert[None, :]
            g += tl.load(at, mask=inside[:, None] & (expert < E)[None, :], other=0.0)
        g1, g2, g3 = parts_of(g, dtype)
        left1 = load_rows(x, row, inside, c1, FULL, DIM).T
        acc1 = tl.dot(left1, g1, tl.dot(left1, g2, tl.dot(left1, g3, acc1)))
        dx1 = tl.dot(g1, first1, tl.dot(g2, first1, tl.dot(g1, second1)))
        if ADDS_ROWS:
            dx1 += load_rows(drows, row, inside, c1, FULL, DIM).to(tl.float32)
        store_rows(dx, row, inside, c1, dx1, FULL, DIM)
        if D2 > 0:
            left2 = load_rows(x, row, inside, c2, FULL, DIM).T
            acc2 = tl.dot(left2, g1, tl.dot(left2, g2, tl.dot(left2, g3, acc2)))
            dx2 = tl.dot(g1, first2, tl.dot(g2, first2, tl.dot(g1, second2)))
            if ADDS_ROWS:
                dx2 += load_rows(drows, row, inside, c2, FULL, DIM).to(tl.float32)
            store_rows(dx, row, inside, c2, dx2, FULL, DIM)
    parts += tl.program_id(0).to(tl.int64) * E * DIM
    tl.store(parts + expert[None, :] * DIM + c1[:, None], acc1, mask=(c1 < DIM)[:, None] & (expert < E)[None, :])
    if D2 > 0:
        tl.store(parts + expert[None, :] * DIM + c2[:, None], acc2, mask=(c2 < DIM)[:, None] & (expert < E)[None, :])
