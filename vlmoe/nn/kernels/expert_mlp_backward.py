# type: ignore  # kernels are Triton's language, which checkers read as Python
"""The experts' MLPs, backward, chunk by chunk of tiles.

`row_gradients` recomputes the hidden layer of a chunk, finishes the gradients of rows and combine weights, and leaves
the operands of the weight gradients in expert order in a buffer of one chunk's size; `weight_gradients` multiplies
these, split over segments of tiles, which `reduce_segments` adds in order. So memory does not grow with slots times
hidden width, nothing is recomputed twice, and no float is added atomically.

Axes as in `expert_mlp`. A chunk is cut into segments of `segment_tiles` tiles. The part of expert e in segment s goes to place
s + e - (first expert of the chunk): along the expert order either s or e grows, so no two parts share a place.
"""

import triton
import triton.language as tl

from vlmoe.nn.kernels.activations import activate_with_slope
from vlmoe.nn.kernels.expert_mlp import load_in, load_out, load_rows, load_vector, store_rows


@triton.jit(do_not_specialize=["first_tile"])
def row_gradients(
    x, dy, slots, ends, tile_expert, tile_place, weights, w_in, w_out, w_gate, b_in, b_out, b_gate,
    dx, dweights, hiddens, gathered, bias_parts, first_tile, E, chunk_rows,
    TOP_K: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile: dx[slot], dweights[slot], and the operands of the weight gradients.

    Those are `hiddens` [2 or 3, chunk_rows, hidden]: the gradient of w_in x + b_in, the activated hidden layer, and for
    swiglu the gradient of w_gate x + b_gate; and `gathered` [2, chunk_rows, dim]: x, and weight * dy.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    FULL: tl.constexpr = (D1 + D2 == DIM) and (HIDDEN % BLOCK_N == 0)
    dtype: tl.constexpr = x.dtype.element_ty
    tile = first_tile + tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert < E:
        place = tl.load(tile_place + tile) + tl.arange(0, BLOCK_M)
        valid = place < tl.load(ends + expert)
        slot = tl.load(slots + place, mask=valid, other=0)
        row = (slot // TOP_K).to(tl.int64)
        weight = tl.load(weights + slot, mask=valid, other=0.0)
        local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        every = local >= 0
        weighted = gathered + chunk_rows.to(tl.int64) * DIM
        part = bias_parts + tile.to(tl.int64) * DIM
        c1 = tl.arange(0, D1)
        x1 = load_rows(x, row, valid, c1, FULL, DIM)
        dy1 = load_rows(dy, row, valid, c1, FULL, DIM)
        dy1_weighted = dy1.to(tl.float32) * weight[:, None]
        store_rows(gathered, local, every, c1, x1, FULL, DIM)
        store_rows(weighted, local, every, c1, dy1_weighted, FULL, DIM)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
        dweight = tl.zeros([BLOCK_M], tl.float32)
        if BIAS:
            dweight += tl.sum(dy1.to(tl.float32) * load_vector(b_out + expert * DIM, c1, FULL, DIM)[None, :], 1)
            tl.store(part + c1, tl.sum(dy1_weighted, 0), mask=c1 < DIM)
        if D2 > 0:
            c2 = D1 + tl.arange(0, D2)
            x2 = load_rows(x, row, valid, c2, FULL, DIM)
            dy2 = load_rows(dy, row, valid, c2, FULL, DIM)
            acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
            dy2_weighted = dy2.to(tl.float32) * weight[:, None]
            store_rows(gathered, local, every, c2, x2, FULL, DIM)
            store_rows(weighted, local, every, c2, dy2_weighted, FULL, DIM)
            if BIAS:
                dweight += tl.sum(dy2.to(tl.float32) * load_vector(b_out + expert * DIM, c2, FULL, DIM)[None, :], 1)
                tl.store(part + c2, tl.sum(dy2_weighted, 0), mask=c2 < DIM)
        size = chunk_rows.to(tl.int64) * HIDDEN
        matrix = expert.to(tl.int64) * HIDDEN * DIM
        w_in += matrix
        w_out += matrix
        w_gate += matrix
        for first in tl.range(0, HIDDEN, BLOCK_N, num_stages=STAGES):
            n = first + tl.arange(0, BLOCK_N)
            in1 = load_in(w_in, n, c1, FULL, HIDDEN, DIM)
            h = tl.dot(x1, in1.T)
            da = tl.dot(dy1, load_out(w_out, n, c1, FULL, HIDDEN, DIM))
            if D2 > 0:
                in2 = load_in(w_in, n, c2, FULL, HIDDEN, DIM)
                h = tl.dot(x2, in2.T, h)
                da = tl.dot(dy2, load_out(w_out, n, c2, FULL, HIDDEN, DIM), da)
            if BIAS:
                h += load_vector(b_in + expert * HIDDEN, n, FULL, HIDDEN)[None, :]
            if GATED:
                gate1 = load_in(w_gate, n, c1, FULL, HIDDEN, DIM)
                g = tl.dot(x1, gate1.T)
                if D2 > 0:
                    gate2 = load_in(w_gate, n, c2, FULL, HIDDEN, DIM)
                    g = tl.dot(x2, gate2.T, g)
                if BIAS:
                    g += load_vector(b_gate + expert * HIDDEN, n, FULL, HIDDEN)[None, :]
                sigmoid = tl.sigmoid(g)
                silu = g * sigmoid
                a = silu * h
                dweight += tl.sum(da * a, 1)
                da *= weight[:, None]
                dg = (da * h * (sigmoid + silu * (1 - sigmoid))).to(dtype)
                dh = (da * silu).to(dtype)
                store_rows(hiddens + 2 * size, local, every, n, dg, FULL, HIDDEN)
                acc1 = tl.dot(dg, gate1, acc1)
                if D2 > 0:
                    acc2 = tl.dot(dg, gate2, acc2)
            else:
                a, slope = activate_with_slope(h, ACTIVATION)
                dweight += tl.sum(da * a, 1)
                dh = (da * slope * weight[:, None]).to(dtype)
            store_rows(hiddens, local, every, n, dh, FULL, HIDDEN)
            store_rows(hiddens + size, local, every, n, a, FULL, HIDDEN)
            acc1 = tl.dot(dh, in1, acc1)
            if D2 > 0:
                acc2 = tl.dot(dh, in2, acc2)
        tl.store(dweights + slot, dweight, mask=valid)
        store_rows(dx, slot.to(tl.int64), valid, c1, acc1, FULL, DIM)
        if D2 > 0:
            store_rows(dx, slot.to(tl.int64), valid, c2, acc2, FULL, DIM)


@triton.jit(do_not_specialize=["first_tile", "num_tiles", "segment_tiles"])
def weight_gradients(
    hiddens, gathered, ends, tile_expert, tile_place, parts, first_tile, num_tiles, segment_tiles, E, chunk_rows,
    PLACES: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hiddens^T [hidden, slots] @ gathered [slots, dim], per expert of a segment, into `parts`.

    `parts` is [2 or 3, PLACES, hidden * dim + hidden], weight gradients with bias gradients behind them. The activated
    hidden layer meets weight * dy, the gradients meet x. The bias gradients (sums over slots) are one more product, with
    ones: the tensor cores add faster than warps shuffle.
    """
    FULL: tl.constexpr = (D1 + D2 == DIM) and (HIDDEN % BLOCK_F == 0)
    which = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    c1 = tl.arange(0, D1)
    c2 = D1 + tl.arange(0, D2 if D2 > 0 else 16)
    hiddens += which * chunk_rows * HIDDEN
    if which == 1:
        gathered += chunk_rows.to(tl.int64) * DIM
    tile = segment * segment_tiles
    behind = tl.minimum(tile + segment_tiles, num_tiles)
    first_expert = tl.load(tile_expert + first_tile)
    ones = tl.full([BLOCK_K, 16], 1.0, tl.float32).to(hiddens.dtype.element_ty)
    while tile < behind:
        expert = tl.load(tile_expert + first_tile + tile)
        if expert < E:
            left_over = tl.load(ends + expert) - tl.load(tile_place + first_tile + tile)
            count = tl.minimum((left_over + BLOCK_M - 1) // BLOCK_M, behind - tile)
            acc1 = tl.zeros([BLOCK_F, D1], tl.float32)
            acc2 = tl.zeros([BLOCK_F, D2 if D2 > 0 else 16], tl.float32)
            sums = tl.zeros([BLOCK_F, 16], tl.float32)
            for k in tl.range(0, count * BLOCK_M, BLOCK_K, num_stages=STAGES):
                row = (tile * BLOCK_M + k + tl.arange(0, BLOCK_K)).to(tl.int64)
                left = load_in(hiddens, row, f, FULL, chunk_rows, HIDDEN).T
                acc1 = tl.dot(left, load_in(gathered, row, c1, FULL, chunk_rows, DIM), acc1)
                if D2 > 0:
                    acc2 = tl.dot(left, load_in(gathered, row, c2, FULL, chunk_rows, DIM), acc2)
                if BIAS:
                    sums = tl.dot(left, ones, sums)
            part = parts + (which * PLACES + segment + expert - first_expert) * (HIDDEN * DIM + HIDDEN)
            inside = f < HIDDEN
            store_rows(part, f, inside, c1, acc1, FULL, DIM)
            if D2 > 0:
                store_rows(part, f, inside, c2, acc2, FULL, DIM)
            if BIAS:
                tl.store(part + HIDDEN * DIM + f, tl.max(sums, 1), mask=inside)
            tile += count
        else:
            tile = behind


@triton.jit(do_not_specialize=["first_tile", "num_tiles", "segment_tiles"])
def reduce_segments(
    parts, total, tile_expert, tile_base, first_tile, num_tiles, segment_tiles, E,
    PLACES: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total[which, expert] += its parts of this chunk, in segment order: the first SIZE elements of each STRIDE."""
    expert = tl.program_id(1)
    which = tl.program_id(2).to(tl.int64)
    base = tl.load(tile_base + expert)
    low = tl.maximum(base, first_tile) - first_tile
    high = tl.minimum(tl.load(tile_base + expert + 1), first_tile + num_tiles) - first_tile
    if low < high:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        into = total + (which * E + expert) * STRIDE + at
        acc = tl.load(into, mask=inside & (base < first_tile), other=0.0)
        shift = expert - tl.load(tile_expert + first_tile)
        for segment in range(low // segment_tiles, (high - 1) // segment_tiles + 1):
            acc += tl.load(parts + (which * PLACES + segment + shift) * STRIDE + at, mask=inside, other=0.0)
        tl.store(into, acc, mask=inside)


@triton.jit(do_not_specialize=["segment_tiles"])
def finish_segments(
    parts, tile_base, dw_in, dw_out, db_in, segment_tiles, PLACES: tl.constexpr, HIDDEN: tl.constexpr,
    DIM: tl.constexpr, BIAS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of w_in [E, hidden, dim], w_out [E, dim, hidden] and b_in, from the parts of all tiles in one chunk."""
    expert = tl.program_id(1)
    which = tl.program_id(2).to(tl.int64)
    BLOCKS_D: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    f = (tl.program_id(0) // BLOCKS_D) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = (tl.program_id(0) % BLOCKS_D) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (f < HIDDEN)[:, None] & (d < DIM)[None, :]
    low, high = tl.load(tile_base + expert), tl.load(tile_base + expert + 1)
    first_segment = low // segment_tiles
    behind = tl.where(low < high, (high - 1) // segment_tiles + 1, first_segment)
    acc = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_F], tl.float32)
    for segment in range(first_segment, behind):
        part = parts + (which * PLACES + segment + expert) * (HIDDEN * DIM + HIDDEN)
        acc += tl.load(part + f[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        if BIAS and which == 0:
            sums += tl.load(part + HIDDEN * DIM + f, mask=f < HIDDEN, other=0.0)
    matrix = expert.to(tl.int64) * HIDDEN * DIM
    dtype = dw_in.dtype.element_ty
    if which == 0:
        tl.store(dw_in + matrix + f[:, None] * DIM + d[None, :], acc.to(dtype), mask=inside)
        if BIAS and tl.program_id(0) % BLOCKS_D == 0:
            tl.store(db_in + expert * HIDDEN + f, sums.to(dtype), mask=f < HIDDEN)
    else:
        at = d[:, None] * HIDDEN + f[None, :]
        tl.store(dw_out + matrix + at, acc.to(dtype).T, mask=(d < DIM)[:, None] & (f < HIDDEN)[None, :])


@triton.jit
def sum_tiles(parts, out, tile_base, DIM: tl.constexpr, PER_TILE: tl.constexpr, BLOCK: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """out[expert] = sum over its tiles of the PER_TILE rows of parts that each has."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    low, high = tl.load(tile_base + expert) * PER_TILE, tl.load(tile_base + expert + 1) * PER_TILE
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(low, high, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        inside = (tile < high)[:, None] & (column < DIM)[None, :]
        acc += tl.load(parts + tile.to(tl.int64)[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    tl.store(out + expert * DIM + column, tl.sum(acc, 0).to(out.dtype.element_ty), mask=column < DIM)
