# type: ignore  # kernels are Triton's language, which checkers read as Python
"""Layer norms with what stands before them, in one pass over rows each way: a residual sum, or, between the two products of a
dense feed-forward layer, its first bias and GELU.

Inductor sums the gradients of a norm's vectors in further kernels, and goes through rows longer than 1,024 twice in each.
Axes: `rows` of DIM columns (WIDTH, padded). Programs take every n-th row, so that vectors are read once.
"""

import triton
import triton.language as tl

from vlmoe.nn.kernels.activations import activate, activate_with_slope
from vlmoe.nn.kernels.expert_mlp import load_rows, load_vector, store_rows


@triton.jit
def gelu_norm(x, shift, weight, bias, y, means, scales, rows, eps, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """y = weight * (GELU(x + shift) - mean) * scale + bias, with each row's mean and scale = 1 / sqrt(variance + eps)."""
    column = tl.arange(0, WIDTH)
    inside, stride = column < DIM, tl.full([1], DIM, tl.int64)
    s = load_vector(shift, column, False, DIM)
    w, b = load_vector(weight, column, False, DIM), load_vector(bias, column, False, DIM)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * stride
        h = load_vector(x + at, column, False, DIM) + s
        a = activate(h, h, "gelu")
        mean = tl.sum(a, 0) / DIM
        centred = tl.where(inside, a - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
        tl.store(y + at + column, (centred * scale * w + b).to(y.dtype.element_ty), mask=inside)
        tl.store(means + row, mean)
        tl.store(scales + row, scale)


@triton.jit
def gelu_norm_gradients(dy, x, shift, weight, means, scales, dx, parts, rows, DIM: tl.constexpr,
                        WIDTH: tl.constexpr):  # fmt: skip
    """dx, and this program's part [3, DIM] of the gradients of shift, weight and bias."""
    column = tl.arange(0, WIDTH)
    inside, stride = column < DIM, tl.full([1], DIM, tl.int64)
    s, w = load_vector(shift, column, False, DIM), load_vector(weight, column, False, DIM)
    ds, dw, db = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * stride
        scale = tl.load(scales + row)
        a, slope = activate_with_slope(load_vector(x + at, column, False, DIM) + s, "gelu")
        normed = tl.where(inside, (a - tl.load(means + row)) * scale, 0.0)
        g = load_vector(dy + at, column, False, DIM)
        dw += g * normed
        db += g
        g *= w
        dh = (g - tl.sum(g, 0) / DIM - normed * (tl.sum(g * normed, 0) / DIM)) * scale * slope
        ds += dh
        tl.store(dx + at + column, dh.to(dx.dtype.element_ty), mask=inside)
    parts += tl.program_id(0) * 3 * DIM + column
    tl.store(parts, ds, mask=inside)
    tl.store(parts + DIM, dw, mask=inside)
    tl.store(parts + 2 * DIM, db, mask=inside)


@triton.jit
def add_norm(x, y, factor, weight, bias, total, normed, means, scales, rows, rows_per_factor, eps, ADDS: tl.constexpr,
             FACTORS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """total = x + factor * y, and its norm: weight * (total - mean) * scale + bias, with scale = 1 / sqrt(variance + eps)."""
    column = tl.arange(0, WIDTH)
    w, b = load_vector(weight, column, False, DIM), load_vector(bias, column, False, DIM)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at, valid = row.to(tl.int64), row < rows
        h = load_rows(x, at, valid, column, False, DIM).to(tl.float32)
        if ADDS:
            added = load_rows(y, at, valid, column, False, DIM).to(tl.float32)
            if FACTORS:
                added *= tl.load(factor + row // rows_per_factor, mask=valid, other=0.0).to(tl.float32)[:, None]
            h = (h + added).to(total.dtype.element_ty).to(tl.float32)
            store_rows(total, at, valid, column, h, False, DIM)
        mean = tl.sum(h, 1) / DIM
        centred = tl.where((column < DIM)[None, :], h - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / DIM + eps)
        store_rows(normed, at, valid, column, centred * scale[:, None] * w[None, :] + b[None, :], False, DIM)
        tl.store(means + row, mean, mask=valid)
        tl.store(scales + row, scale, mask=valid)


@triton.jit
def add_norm_gradients(d_normed, d_total, total, factor, weight, means, scales, dx, dy, parts, rows, rows_per_factor,
                       ADDS: tl.constexpr, FACTORS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
                       ROWS: tl.constexpr):  # fmt: skip
    """dx and dy, and this program's part [2, DIM] of the gradients of weight and bias."""
    column = tl.arange(0, WIDTH)
    w = load_vector(weight, column, False, DIM)
    dw, db = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at, valid = row.to(tl.int64), row < rows
        mean = tl.load(means + row, mask=valid, other=0.0)
        scale = tl.load(scales + row, mask=valid, other=0.0)
        centred = load_rows(total, at, valid, column, False, DIM).to(tl.float32) - mean[:, None]
        n = tl.where((column < DIM)[None, :], centred * scale[:, None], 0.0)
        g = load_rows(d_normed, at, valid, column, False, DIM).to(tl.float32)
        dw += g * n
        db += g
        g *= w[None, :]
        d = (g - (tl.sum(g, 1) / DIM)[:, None] - n * (tl.sum(g * n, 1) / DIM)[:, None]) * scale[:, None]
        if ADDS:
            d += load_rows(d_total, at, valid, column, False, DIM).to(tl.float32)
        store_rows(dx, at, valid, column, d, False, DIM)
        if ADDS:
            if FACTORS:
                d *= tl.load(factor + row // rows_per_factor, mask=valid, other=0.0).to(tl.float32)[:, None]
            store_rows(dy, at, valid, column, d, False, DIM)
    parts += tl.program_id(0) * 2 * DIM + column
    tl.store(parts, tl.sum(dw, 0), mask=column < DIM)
    tl.store(parts + DIM, tl.sum(db, 0), mask=column < DIM)
