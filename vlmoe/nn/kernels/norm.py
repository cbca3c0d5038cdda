# type: ignore  # kernels are Triton's language, which checkers read as Python
"""GELU and the layer norm after it (Magneto's second one, in dense feed-forward layers), in one pass over rows each way.

Inductor goes through rows longer than 1,024 twice in each kernel, and sums the gradients of weight and bias in one more.
Axes: `rows` of DIM columns (WIDTH, padded). Programs take every n-th row, so that weights are read once.
"""

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """GELU(x) and its derivative, exact."""
    cdf = 0.5 * tl.erf(x * 0.7071067811865476) + 0.5
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_norm(x, weight, bias, y, means, scales, rows, eps, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """y = weight * (GELU(x) - mean) * scale + bias, with each row's mean and scale = 1 / sqrt(variance + eps)."""
    column = tl.arange(0, WIDTH)
    inside, stride = column < DIM, tl.full([1], DIM, tl.int64)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * stride + column
        a, _ = gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32))
        mean = tl.sum(a, 0) / DIM
        centred = tl.where(inside, a - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
        tl.store(y + at, (centred * scale * w + b).to(y.dtype.element_ty), mask=inside)
        tl.store(means + row, mean)
        tl.store(scales + row, scale)


@triton.jit
def gelu_norm_gradients(dy, x, weight, means, scales, dx, parts, rows, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """dx, and this program's part [2, DIM] of the gradients of weight and bias."""
    column = tl.arange(0, WIDTH)
    inside, stride = column < DIM, tl.full([1], DIM, tl.int64)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dw, db = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * stride + column
        scale = tl.load(scales + row)
        a, slope = gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32))
        normed = tl.where(inside, (a - tl.load(means + row)) * scale, 0.0)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        dw += g * normed
        db += g
        g *= w
        da = (g - tl.sum(g, 0) / DIM - normed * (tl.sum(g * normed, 0) / DIM)) * scale
        tl.store(dx + at, (da * slope).to(dx.dtype.element_ty), mask=inside)
    parts += tl.program_id(0) * 2 * DIM + column
    tl.store(parts, dw, mask=inside)
    tl.store(parts + DIM, db, mask=inside)
