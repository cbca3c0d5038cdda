# type: ignore  # kernels are Triton's language, which checkers read as Python
"""What stands between the two products of a dense feed-forward layer, its first bias, GELU and Magneto's layer norm, in one
pass over rows each way.

Inductor goes through rows longer than 1,024 twice in each kernel, and sums the gradients of the vectors in others.
Axes: `rows` of DIM = D1 + D2 columns (padded). Programs take every n-th row, so that vectors are read once.
"""

import triton
import triton.language as tl

from vlmoe.nn.kernels.activations import activate, activate_with_slope
from vlmoe.nn.kernels.expert_mlp import load_bias


@triton.jit
def store_part(base, column, values, FULL: tl.constexpr, DIM: tl.constexpr):
    if FULL:
        tl.store(base + column, values.to(base.dtype.element_ty))
    else:
        tl.store(base + column, values.to(base.dtype.element_ty), mask=column < DIM)


@triton.jit
def centre(a, mean, column, FULL: tl.constexpr, DIM: tl.constexpr):
    return a - mean if FULL else tl.where(column < DIM, a - mean, 0.0)


@triton.jit
def gelu_norm(x, shift, weight, bias, y, means, scales, rows, eps, DIM: tl.constexpr, D1: tl.constexpr,
              D2: tl.constexpr):  # fmt: skip
    """y = weight * (GELU(x + shift) - mean) * scale + bias, with each row's mean and scale = 1 / sqrt(variance + eps)."""
    FULL: tl.constexpr = D1 + D2 == DIM
    c1, stride = tl.arange(0, D1), tl.full([1], DIM, tl.int64)
    s1, w1, b1 = load_bias(shift, c1, FULL, DIM), load_bias(weight, c1, FULL, DIM), load_bias(bias, c1, FULL, DIM)
    if D2 > 0:
        c2 = D1 + tl.arange(0, D2)
        s2, w2, b2 = load_bias(shift, c2, FULL, DIM), load_bias(weight, c2, FULL, DIM), load_bias(bias, c2, FULL, DIM)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * stride
        h1 = load_bias(x + at, c1, FULL, DIM) + s1
        a1 = activate(h1, h1, "gelu")
        total = tl.sum(a1, 0)
        if D2 > 0:
            h2 = load_bias(x + at, c2, FULL, DIM) + s2
            a2 = activate(h2, h2, "gelu")
            total += tl.sum(a2, 0)
        mean = total / DIM
        a1 = centre(a1, mean, c1, FULL, DIM)
        total = tl.sum(a1 * a1, 0)
        if D2 > 0:
            a2 = centre(a2, mean, c2, FULL, DIM)
            total += tl.sum(a2 * a2, 0)
        scale = tl.rsqrt(total / DIM + eps)
        store_part(y + at, c1, a1 * scale * w1 + b1, FULL, DIM)
        if D2 > 0:
            store_part(y + at, c2, a2 * scale * w2 + b2, FULL, DIM)
        tl.store(means + row, mean)
        tl.store(scales + row, scale)


@triton.jit
def gelu_norm_gradients(dy, x, shift, weight, means, scales, dx, parts, rows, DIM: tl.constexpr, D1: tl.constexpr,
                        D2: tl.constexpr):  # fmt: skip
    """dx, and this program's part [3, DIM] of the gradients of shift, weight and bias."""
    FULL: tl.constexpr = D1 + D2 == DIM
    c1, stride = tl.arange(0, D1), tl.full([1], DIM, tl.int64)
    s1, w1 = load_bias(shift, c1, FULL, DIM), load_bias(weight, c1, FULL, DIM)
    ds1, dw1, db1 = tl.zeros([D1], tl.float32), tl.zeros([D1], tl.float32), tl.zeros([D1], tl.float32)
    if D2 > 0:
        c2 = D1 + tl.arange(0, D2)
        s2, w2 = load_bias(shift, c2, FULL, DIM), load_bias(weight, c2, FULL, DIM)
        ds2, dw2, db2 = tl.zeros([D2], tl.float32), tl.zeros([D2], tl.float32), tl.zeros([D2], tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * stride
        mean, scale = tl.load(means + row), tl.load(scales + row)
        a1, slope1 = activate_with_slope(load_bias(x + at, c1, FULL, DIM) + s1, "gelu")
        n1 = centre(a1, mean, c1, FULL, DIM) * scale
        g1 = load_bias(dy + at, c1, FULL, DIM)
        dw1 += g1 * n1
        db1 += g1
        g1 *= w1
        both, along = tl.sum(g1, 0), tl.sum(g1 * n1, 0)
        if D2 > 0:
            a2, slope2 = activate_with_slope(load_bias(x + at, c2, FULL, DIM) + s2, "gelu")
            n2 = centre(a2, mean, c2, FULL, DIM) * scale
            g2 = load_bias(dy + at, c2, FULL, DIM)
            dw2 += g2 * n2
            db2 += g2
            g2 *= w2
            both += tl.sum(g2, 0)
            along += tl.sum(g2 * n2, 0)
        both, along = both / DIM, along / DIM
        dx1 = (g1 - both - n1 * along) * scale * slope1
        ds1 += dx1
        store_part(dx + at, c1, dx1, FULL, DIM)
        if D2 > 0:
            dx2 = (g2 - both - n2 * along) * scale * slope2
            ds2 += dx2
            store_part(dx + at, c2, dx2, FULL, DIM)
    parts += tl.program_id(0) * 3 * DIM
    store_part(parts, c1, ds1, FULL, DIM)
    store_part(parts + DIM, c1, dw1, FULL, DIM)
    store_part(parts + 2 * DIM, c1, db1, FULL, DIM)
    if D2 > 0:
        store_part(parts, c2, ds2, FULL, DIM)
        store_part(parts + DIM, c2, dw2, FULL, DIM)
        store_part(parts + 2 * DIM, c2, db2, FULL, DIM)
