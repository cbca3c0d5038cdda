# type: ignore  # kernels are Triton's language, which checkers read as Python
"""What stands between the two products of a dense feed-forward layer, its first bias, GELU and Magneto's layer norm, in one
pass over rows each way.

Inductor goes through rows longer than 1,024 twice in each kernel, and sums the gradients of the vectors in others.
Axes: `rows` of DIM columns (WIDTH, padded). Programs take every n-th row, so that vectors are read once.
"""

import triton
import triton.language as tl

from vlmoe.nn.kernels.activations import activate, activate_with_slope
from vlmoe.nn.kernels.expert_mlp import load_vector


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
