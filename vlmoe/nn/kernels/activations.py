# type: ignore  # kernels are Triton's language, which checkers read as Python
"""Activations of the experts and their derivatives, in float32 registers.

They share their cycles with the tensor cores: `erf` in two ranges costs a fifth of the forward kernel.
"""

import torch
import triton
import triton.language as tl

LINEAR, CUBIC = tl.constexpr(0.8), tl.constexpr(0.0348)  # a and b of `normal_cdf`
HAS_TANH_INSTRUCTION = tl.constexpr(torch.version.cuda is not None and not triton.knobs.runtime.interpret)


@triton.jit
def normal_cdf(x):
    """Phi(x) = (1 + tanh(x (a + b x^2))) / 2 with a and b fitted so that x Phi(x) is within 3e-4 of exact GELU.

    The usual a = 0.7979, b = 0.0357 is the expansion at 0 and errs by 5e-4.
    """
    u = x * (CUBIC * (x * x) + LINEAR)
    if HAS_TANH_INSTRUCTION:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
        return 0.5 * tanh + 0.5
    return tl.sigmoid(2 * u)


@triton.jit
def activate(h, gate, ACTIVATION: tl.constexpr):
    """act(h), or silu(gate) * h."""
    if ACTIVATION == "gelu":
        return h * normal_cdf(h)
    elif ACTIVATION == "relu":
        return tl.maximum(h, 0.0)
    else:
        return gate * tl.sigmoid(gate) * h


@triton.jit
def activate_with_slope(h, ACTIVATION: tl.constexpr):
    """act(h) and act'(h) of the ungated activations, for GELU that of the function above: no second special function."""
    if ACTIVATION == "gelu":
        cdf = normal_cdf(h)
        slope = 3 * CUBIC * 2 * (h * h) + 2 * LINEAR  # of 2 u
        return h * cdf, (cdf - cdf * cdf) * (h * slope) + cdf
    else:
        return tl.maximum(h, 0.0), tl.where(h > 0, 1.0, 0.0)
