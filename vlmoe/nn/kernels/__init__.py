"""Triton kernels for sub-token experts: both products of an expert on chip, routing in a few launches; for layer norms with the
residual sum or the GELU before them; and for attention over modalities that lie in two tensors.

Triton is imported with the first call: it is not there on every machine that the rest of vlmoe.nn runs on.
Axes: `rows` with `top_k` slots each, `dim` of a row, `experts`, `hidden`.
"""

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from vlmoe.nn.experts import ExpertWeights

HAS_TRITON = importlib.util.find_spec("triton") is not None
LEAST_SHARED, AMPERE_SHARED = 227 << 10, 99 << 10  # bytes per block
HEAD_DIMS = (16, 32, 64)  # of `attention_ops`; wider heads would need other tiles
LONGEST_ROW = 8192  # of a norm, in registers
# Triton, and the torch that has it, of the kernels for Hopper: Gluon is not stable yet; add another when tests/gpu passed on it
GLUON_TRITON = {"3.6": "2.11", "3.8": "2.14"}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs kernels on the CPU, slowly


def triton_experts(
    x: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows top_k"],
    weights: Float[Tensor, "rows top_k"],
    bank: "ExpertWeights",
    activation: str,
) -> Float[Tensor, "rows dim"]:
    """The backend "triton" of `vlmoe.nn.experts.experts`: deterministic, without a host sync, float32 sums.

    Raises:
        ValueError: the kernels cannot run this dtype or these widths.
    """
    if problem := triton_problem(x, bank.w_in.shape[1]):
        raise ValueError(problem)
    from vlmoe.nn.kernels import ops, routing_ops

    order, ends = routing_ops.order_slots(expert_ids, len(bank.w_in))
    y, *_ = ops.expert_mlp(
        x, expert_ids, weights, order, ends, bank.w_in, bank.w_out, bank.b_in, bank.b_out, bank.w_gate, bank.b_gate,
        activation,
    )  # fmt: skip
    return y


def triton_problem(x: Float[Tensor, "rows dim"], hidden_dim: int) -> str | None:
    """Why the kernels cannot run here, or None."""
    if not HAS_TRITON:
        return "backend 'triton' needs the package triton; use backend 'grouped'"
    if not x.is_cuda and not INTERPRETED:
        return "backend 'triton' needs a GPU; use backend 'auto'"
    if x.is_cuda and _shared_memory(x.device.index) < LEAST_SHARED:
        return "backend 'triton' needs 227 KiB of shared memory per block (H100, H200, B200); use backend 'grouped'"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"backend 'triton' cannot run {x.dtype}; use bfloat16 autocast, or backend 'grouped'"
    if x.shape[1] % 16 or not 16 <= x.shape[1] <= 384:
        return f"backend 'triton' needs rows of 16 to 384 features, a multiple of 16, not {x.shape[1]}; use 'grouped'"
    if hidden_dim % 16:
        return f"backend 'triton' needs a hidden_dim that is a multiple of 16, not {hidden_dim}; use 'grouped'"
    return None


def slower_kernels(x: Float[Tensor, "rows dim"], hidden_dim: int, activation: str) -> str | None:
    """Why the backend "triton" is slower on this GPU than it could be, or None."""
    from vlmoe.nn.kernels.configs import hopper_row_gradients_tile

    if (
        not suits_hopper(x, activation)
        or hopper_row_gradients_tile(x.shape[1], hidden_dim) is None
        or has_known_gluon()
    ):
        return None
    import triton

    known = f"Triton {' and '.join(GLUON_TRITON)} (torch {' and '.join(GLUON_TRITON.values())})"
    return f"portable kernels; those for Hopper run with {known}, not {triton.__version__}"


def suits_hopper(x: Float[Tensor, "rows dim"], activation: str) -> bool:
    """Whether there are kernels for Hopper of this activation, and x is on such a GPU."""
    return activation != "swiglu" and is_hopper(x.device)


def has_known_gluon() -> bool:
    import triton

    return ".".join(triton.__version__.split(".")[:2]) in GLUON_TRITON


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of what `F.linear` makes of x here: autocast's, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def widened(x: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def top_k_softmax(
    logits: Float[Tensor, "rows experts"], top_k: int
) -> tuple[Float[Tensor, "rows top_k"], Int[Tensor, "rows top_k"]]:
    """`logits.softmax(-1).topk(top_k)`, for float32 logits on a GPU in one kernel, ties to the lower expert."""
    if not logits.is_cuda or logits.dtype != torch.float32 or not HAS_TRITON:
        probs, expert_ids = logits.softmax(-1).topk(top_k, dim=-1)
        return probs, expert_ids
    from vlmoe.nn.kernels import routing_ops

    return routing_ops.top_k_softmax(logits, top_k)


def chooses_in_one_kernel(x: Float[Tensor, "rows dim"], weight: Float[Tensor, "experts dim"]) -> bool:
    """Whether `gate_top_k` can run: on bfloat16 rows on a large GPU, in its shared memory."""
    experts, dim = weight.shape
    fits = dim % 16 == 0 and 64 <= dim <= 256 and experts <= (64 if dim <= 128 else 32)
    runs = x.is_cuda and x.dtype == torch.bfloat16 and HAS_TRITON
    return fits and runs and _shared_memory(x.device.index) >= LEAST_SHARED


def gate_top_k(
    x: Float[Tensor, "rows dim"], weight: Float[Tensor, "experts dim"], top_k: int
) -> tuple[
    Float[Tensor, "rows experts"], Float[Tensor, "rows top_k"], Int[Tensor, "rows top_k"], Float[Tensor, "rows dim"]
]:
    """`F.linear` in float32, without a float32 copy of the rows; its `top_k_softmax`; and x, which experts had better read
    from here: their gradient is then added by the kernel that makes the gate's."""
    from vlmoe.nn.kernels import routing_ops

    return routing_ops.GateTopK.apply(x, weight, top_k)


def count_slots(expert_ids: Int[Tensor, "rows top_k"], num_experts: int) -> Int[Tensor, " experts"]:
    """Slots of each expert; one whose id is `num_experts` has none. On a GPU without atomics, which wait for each other."""
    if expert_ids.is_cuda and HAS_TRITON:
        from vlmoe.nn.kernels import routing_ops

        return routing_ops.count_slots(expert_ids, num_experts)
    if expert_ids.is_cpu and not torch.compiler.is_compiling():  # 20 times faster there, but waits elsewhere
        return torch.bincount(expert_ids.flatten(), minlength=num_experts)[:num_experts]
    counts = expert_ids.new_zeros(num_experts + 1)
    return counts.scatter_add(0, expert_ids.flatten(), torch.ones_like(expert_ids.flatten()))[:num_experts]


def attends_in_parts(qkv: Float[Tensor, "*batch three_d"], attn_heads: int) -> bool:
    """Whether `attention_ops.attend_parts` can run on such projections."""
    fits = qkv.dtype.itemsize == 2 and qkv.shape[-1] // 3 // attn_heads in HEAD_DIMS
    if not (fits and qkv.is_cuda and HAS_TRITON) or torch.version.hip:
        return False
    return _shared_memory(qkv.device.index) >= AMPERE_SHARED  # older ones multiply no bfloat16


def linear_gelu_norm(
    x: Float[Tensor, "*batch in_dim"], linear: nn.Linear, norm: nn.LayerNorm
) -> Float[Tensor, "*batch dim"]:
    """norm(GELU(linear(x))). On a GPU in 16 bits all behind the product is one kernel, which leaves 16 bits also under
    autocast, and whose GELU is within 3e-4 of the exact one."""
    dim = linear.out_features
    if linear.bias is None or not _norms_rows(x, dim):
        return norm(F.gelu(linear(x)))
    from vlmoe.nn.kernels import norm_ops

    hidden = F.linear(x, linear.weight)
    y, _, _ = norm_ops.gelu_norm(hidden.reshape(-1, dim), linear.bias, norm.weight, norm.bias, norm.eps)
    return y.view(hidden.shape)


def residual_sum(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"] | None, factor: Float[Tensor, "..."] | None
) -> Float[Tensor, "*batch dim"]:
    """x + y * factor, as in `add_norm`, in torch's operators."""
    return x if y is None else x + (y if factor is None else y * factor)


def add_norm(
    x: Float[Tensor, "*batch dim"],
    y: Float[Tensor, "*batch dim"] | None,
    norm: nn.LayerNorm,
    factor: Float[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
    """x + y * factor, and its norm. On a GPU in 16 bits both come from one kernel, and the norm in 16 bits also under autocast.

    Args:
        y: None adds nothing.
        factor: one value for each of the first axes of x, such as [B, 1, 1] for x [B, S, dim]; no gradient reaches it.
    """
    dim, dtype = x.shape[-1], product_dtype(x)
    if not _norms_rows(x, dim):
        total = residual_sum(x, y, factor)
        return total, norm(total)
    from vlmoe.nn.kernels import norm_ops

    added = None if y is None else y.reshape(-1, dim)
    factors = None if factor is None else factor.flatten()
    total, normed, _, _ = norm_ops.add_norm(x.reshape(-1, dim), added, factors, norm.weight, norm.bias, norm.eps, dtype)
    return x if y is None else total.view(x.shape), normed.view(x.shape)


def _norms_rows(x: Tensor, dim: int) -> bool:
    """Whether the kernels of norms run on rows of `dim` columns in the dtype of a product of x."""
    return x.is_cuda and product_dtype(x).itemsize == 2 and HAS_TRITON and dim <= LONGEST_ROW


@torch.compiler.assume_constant_result
def _shared_memory(device_index: int) -> int:
    """Bytes that a block may ask for."""
    return torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin
