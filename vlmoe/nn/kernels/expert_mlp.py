# type: ignore  # kernels are Triton's language, which checkers read as Python
"""The experts' MLPs, forward: gather, both products and the activation in one kernel; the hidden layer stays on chip.

Axes: `slots` in expert order, cut into tiles of BLOCK_M that never span two experts; `dim` = D1 + D2 columns, as a
block is a power of two wide (192 = 128 + 64); `hidden` in blocks of BLOCK_N.
"""

import triton
import triton.language as tl

from vlmoe.nn.kernels.activations import activate


@triton.jit
def tile_table(ends, tile_expert, tile_place, tile_base, num_tiles, E, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """Which expert each tile belongs to (E: none) and its first place in expert order; each expert's first tile."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < E, other=0)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    tiles = tl.where(expert < E, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    behind = tl.cumsum(tiles, 0)
    first = behind - tiles
    passed = (behind[None, :] <= tile[:, None]) & (expert < E)[None, :]
    mine = (first[None, :] <= tile[:, None]) & (tile[:, None] < behind[None, :])
    place = tl.sum(tl.where(mine, start[None, :] + (tile[:, None] - first[None, :]) * BLOCK_M, 0), 1)
    tl.store(tile_expert + tile, tl.sum(passed.to(tl.int32), 1), mask=tile < num_tiles)
    tl.store(tile_place + tile, place, mask=tile < num_tiles)
    if tl.program_id(0) == 0:
        tl.store(tile_base + expert, first, mask=expert < E)
        tl.store(tile_base + E + expert * 0, tl.sum(tiles, 0), mask=expert == 0)


@triton.jit
def load_in(w, n, column, FULL: tl.constexpr, HIDDEN, DIM: tl.constexpr):
    """[BLOCK_N, columns] of one expert's [hidden, dim] matrix."""
    at = w + n[:, None] * DIM + column[None, :]
    if FULL:
        return tl.load(at)
    return tl.load(at, mask=(n < HIDDEN)[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def load_out(w, n, column, FULL: tl.constexpr, HIDDEN: tl.constexpr, DIM: tl.constexpr):
    """[columns, BLOCK_N] of one expert's [dim, hidden] matrix."""
    at = w + column[:, None] * HIDDEN + n[None, :]
    if FULL:
        return tl.load(at)
    return tl.load(at, mask=(column < DIM)[:, None] & (n < HIDDEN)[None, :], other=0.0)


@triton.jit
def load_rows(base, row, valid, column, FULL: tl.constexpr, DIM: tl.constexpr):
    """[rows, columns], zero where a row is not valid."""
    at = base + row[:, None] * DIM + column[None, :]
    if FULL:
        return tl.load(at, mask=valid[:, None], other=0.0)
    return tl.load(at, mask=valid[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, row, valid, column, values, FULL: tl.constexpr, DIM: tl.constexpr):
    at = base + row[:, None] * DIM + column[None, :]
    keep = valid[:, None] if FULL else valid[:, None] & (column < DIM)[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=keep)


@triton.jit
def load_vector(base, index, FULL: tl.constexpr, SIZE: tl.constexpr):
    if FULL:
        return tl.load(base + index).to(tl.float32)
    return tl.load(base + index, mask=index < SIZE, other=0.0).to(tl.float32)


@triton.jit
def forward(
    x, slots, ends, tile_expert, tile_place, weights, w_in, w_out, w_gate, b_in, b_out, b_gate, y, E,
    TOP_K: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[slot] = weight * f(x[row of slot]) for one tile. Stores in slot order, so that a row's slots are neighbours."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    FULL: tl.constexpr = (D1 + D2 == DIM) and (HIDDEN % BLOCK_N == 0)
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert < E:
        place = tl.load(tile_place + tile) + tl.arange(0, BLOCK_M)
        valid = place < tl.load(ends + expert)
        slot = tl.load(slots + place, mask=valid, other=0)
        row = (slot // TOP_K).to(tl.int64)
        c1 = tl.arange(0, D1)
        x1 = load_rows(x, row, valid, c1, FULL, DIM)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
        if D2 > 0:
            c2 = D1 + tl.arange(0, D2)
            x2 = load_rows(x, row, valid, c2, FULL, DIM)
            acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
        matrix = expert.to(tl.int64) * HIDDEN * DIM
        w_in += matrix
        w_out += matrix
        w_gate += matrix
        for first in tl.range(0, HIDDEN, BLOCK_N, num_stages=STAGES):
            n = first + tl.arange(0, BLOCK_N)
            h = tl.dot(x1, load_in(w_in, n, c1, FULL, HIDDEN, DIM).T)
            if D2 > 0:
                h = tl.dot(x2, load_in(w_in, n, c2, FULL, HIDDEN, DIM).T, h)
            if BIAS:
                h += load_vector(b_in + expert * HIDDEN, n, FULL, HIDDEN)[None, :]
            g = h
            if GATED:
                g = tl.dot(x1, load_in(w_gate, n, c1, FULL, HIDDEN, DIM).T)
                if D2 > 0:
                    g = tl.dot(x2, load_in(w_gate, n, c2, FULL, HIDDEN, DIM).T, g)
                if BIAS:
                    g += load_vector(b_gate + expert * HIDDEN, n, FULL, HIDDEN)[None, :]
            a = activate(h, g, ACTIVATION).to(x.dtype.element_ty)
            acc1 = tl.dot(a, load_out(w_out, n, c1, FULL, HIDDEN, DIM).T, acc1)
            if D2 > 0:
                acc2 = tl.dot(a, load_out(w_out, n, c2, FULL, HIDDEN, DIM).T, acc2)
        weight = tl.load(weights + slot, mask=valid, other=0.0)[:, None]
        if BIAS:
            acc1 += load_vector(b_out + expert * DIM, c1, FULL, DIM)[None, :]
        store_rows(y, slot.to(tl.int64), valid, c1, acc1 * weight, FULL, DIM)
        if D2 > 0:
            if BIAS:
                acc2 += load_vector(b_out + expert * DIM, c2, FULL, DIM)[None, :]
            store_rows(y, slot.to(tl.int64), valid, c2, acc2 * weight, FULL, DIM)


@triton.jit
def sum_slots(y, expert_ids, out, rows, E, TOP_K: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """out[row] = sum of its slots' y, in float32. Slots without an expert are not read: nothing wrote them."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    for j in tl.static_range(TOP_K):
        slot = row * TOP_K + j
        has_expert = tl.load(expert_ids + slot, mask=row < rows, other=0) < E
        at = y + slot[:, None] * DIM + column[None, :]
        total += tl.load(at, mask=inside & has_expert[:, None], other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * DIM + column[None, :], total.to(out.dtype.element_ty), mask=inside)
