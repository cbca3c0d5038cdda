# type: ignore  # kernels are Triton's language, which checkers read as Python
"""Attention over sequences whose two parts lie in two tensors, nothing joined, nothing padded.

Sample b attends over its V rows of a [B, V] tensor and, behind them, over rows `spans[b]` of packed text. Rows hold queries,
keys and values of all heads side by side; `sums` and `stats` have one entry per head and row, those of vision first. Scores
are in base 2: `scale` has a factor of log2(e). (FlashAttention-2, arXiv:2307.08691, with its gradients in two kernels, so that
no program adds to what another writes.)
Axes: HEADS of DIM features; positions of a sample in blocks of BLOCK_M, those they meet in steps of BLOCK_N.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)  # the factor that scores in base 2 have, as their gradients have it
SIZES = ("V", "rows", "text_row", "blocks")  # one compiled kernel serves all of them


@triton.jit
def mine(spans, blocks, V, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's first position and head; its sample's number of positions, and where they lie: `at`, a triple of the
    sample, its first row of text and V."""
    head, sample = tl.program_id(0) // blocks % HEADS, tl.program_id(0) // blocks // HEADS
    start = tl.load(spans + 2 * sample)
    length = V + tl.load(spans + 2 * sample + 1) - start
    return tl.program_id(0) % blocks * BLOCK_M, head, length, (sample, start, V)


@triton.jit
def places(vision, text, position, at, WIDTH: tl.constexpr):
    """Where the row of each position begins, in elements from `vision`: text too, so that one load serves both parts."""
    apart = (text.to(tl.int64) - vision.to(tl.int64)) // (vision.dtype.element_ty.primitive_bitwidth // 8)
    apart = tl.multiple_of(apart, 8)  # tensors begin at multiples of 16 bytes
    sample, start, V = at
    row = position.to(tl.int64)
    return tl.where(position < V, (row + sample.to(tl.int64) * V) * WIDTH, (row + (start - V)) * WIDTH + apart)


@triton.jit
def load_head(vision, text, position, length, at, first, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """[positions, DIM] from column `first` of their rows; zeros behind the sample's end."""
    row = vision + places(vision, text, position, at, WIDTH)
    return tl.load(row[:, None] + (first + tl.arange(0, DIM))[None, :], mask=(position < length)[:, None], other=0.0)


@triton.jit
def store_head(vision, text, value, position, length, at, first, WIDTH: tl.constexpr, DIM: tl.constexpr):
    row = vision + places(vision, text, position, at, WIDTH)
    value = value.to(vision.dtype.element_ty)
    tl.store(row[:, None] + (first + tl.arange(0, DIM))[None, :], value, mask=(position < length)[:, None])


@triton.jit
def by_row(table, position, at, head, rows, text_row, WIDTH: tl.constexpr = 1):
    """Where the entry of each position stands in a table [heads, rows, WIDTH]; texts begin at `text_row`."""
    sample, start, V = at
    row = tl.where(position < V, position + sample * V, position - V + start + text_row)
    return table + (head.to(tl.int64) * rows + row) * WIDTH


@triton.jit(do_not_specialize=SIZES)
def attend(vision, text, spans, y_vision, y_text, sums, V, rows, text_row, blocks, scale, HEADS: tl.constexpr,
           DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """softmax(q k^T scale) v for a block of queries, and the base-2 logarithm of each row's sum."""
    D: tl.constexpr = HEADS * DIM
    begin, head, length, at = mine(spans, blocks, V, HEADS, BLOCK_M)
    position = begin + tl.arange(0, BLOCK_M)
    if begin < length:
        q = load_head(vision, text, position, length, at, head * DIM, 3 * D, DIM)
        most = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        y = tl.zeros([BLOCK_M, DIM], tl.float32)
        for first in tl.range(0, length, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            k = load_head(vision, text, column, length, at, D + head * DIM, 3 * D, DIM)
            v = load_head(vision, text, column, length, at, 2 * D + head * DIM, 3 * D, DIM)
            s = tl.dot(q, tl.trans(k)) * scale
            s = tl.where((column < length)[None, :], s, -float("inf"))
            above = tl.maximum(most, tl.max(s, 1))
            p = tl.exp2(s - above[:, None])
            fade = tl.exp2(most - above)
            total = total * fade + tl.sum(p, 1)
            y = tl.dot(p.to(v.dtype), v, y * fade[:, None])
            most = above
        store_head(y_vision, y_text, y / total[:, None], position, length, at, head * DIM, D, DIM)
        tl.store(by_row(sums, position, at, head, rows, text_row), most + tl.log2(total), mask=position < length)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(vision, text, y_vision, y_text, dy_vision, dy_text, spans, sums, stats, d_vision, d_text, V, rows, text_row,
                    blocks, scale, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr):  # fmt: skip
    """The gradient of a block of queries. Leaves in `stats`, for `key_gradients`, each row's sum and the product of its output
    and that one's gradient."""
    D: tl.constexpr = HEADS * DIM
    W: tl.constexpr = 3 * D
    begin, head, length, at = mine(spans, blocks, V, HEADS, BLOCK_M)
    position = begin + tl.arange(0, BLOCK_M)
    inside = position < length
    if begin < length:
        y = load_head(y_vision, y_text, position, length, at, head * DIM, D, DIM)
        dy = load_head(dy_vision, dy_text, position, length, at, head * DIM, D, DIM)
        dot = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
        log_sum = tl.load(by_row(sums, position, at, head, rows, text_row), mask=inside, other=float("inf"))
        tl.store(by_row(stats, position, at, head, rows, text_row, 4), log_sum, mask=inside)
        tl.store(by_row(stats, position, at, head, rows, text_row, 4) + 1, dot, mask=inside)
        q = load_head(vision, text, position, length, at, head * DIM, W, DIM)
        dq = tl.zeros([BLOCK_M, DIM], tl.float32)
        for first in tl.range(0, length, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            k = load_head(vision, text, column, length, at, D + head * DIM, W, DIM)
            v = load_head(vision, text, column, length, at, 2 * D + head * DIM, W, DIM)
            p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - log_sum[:, None])
            p = tl.where((column < length)[None, :], p, 0.0)
            ds = p * (tl.dot(dy, tl.trans(v)) - dot[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq)
        dq *= scale * LN_2
        store_head(d_vision, d_text, dq, position, length, at, head * DIM, W, DIM)


@triton.jit(do_not_specialize=SIZES)
def key_gradients(vision, text, dy_vision, dy_text, spans, stats, d_vision, d_text, V, rows, text_row, blocks, scale,
                  HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The gradients of a block of keys and of their values. All products are transposed: [keys, queries]."""
    D: tl.constexpr = HEADS * DIM
    W: tl.constexpr = 3 * D
    begin, head, length, at = mine(spans, blocks, V, HEADS, BLOCK_M)
    position = begin + tl.arange(0, BLOCK_M)
    if begin < length:
        k = load_head(vision, text, position, length, at, D + head * DIM, W, DIM)
        v = load_head(vision, text, position, length, at, 2 * D + head * DIM, W, DIM)
        which = tl.arange(0, 4)[None, :]
        dk, dv = tl.zeros([BLOCK_M, DIM], tl.float32), tl.zeros([BLOCK_M, DIM], tl.float32)
        for first in tl.range(0, length, BLOCK_N):
            row = first + tl.arange(0, BLOCK_N)
            q = load_head(vision, text, row, length, at, head * DIM, W, DIM)
            dy = load_head(dy_vision, dy_text, row, length, at, head * DIM, D, DIM)
            stat = by_row(stats, row, at, head, rows, text_row, 4)[:, None] + which
            stat = tl.load(stat, mask=(row < length)[:, None], other=0.0)
            log_sum = tl.sum(tl.where(which == 0, stat, 0.0), 1)
            dot = tl.sum(tl.where(which == 1, stat, 0.0), 1)
            p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - log_sum[None, :])
            dv = tl.dot(p.to(dy.dtype), dy, dv)
            ds = p * (tl.dot(v, tl.trans(dy)) - dot[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
        dk *= scale * LN_2
        store_head(d_vision, d_text, dk, position, length, at, D + head * DIM, W, DIM)
        store_head(d_vision, d_text, dv, position, length, at, 2 * D + head * DIM, W, DIM)
