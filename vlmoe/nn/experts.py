"""The experts' MLPs over the slots of each row: one function, several backends that compute the same.

Axes: `rows` of width `dim` with `top_k` slots each; `slots` = rows * top_k; `experts` MLPs of width `hidden`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmoe.nn.dispatch import block_order, combine, dispatch, num_blocks, order_slots
from vlmoe.nn.kernels import triton_experts, triton_problem

SMALL = 2**15  # values of an expert's matrix: below it one product for all experts beats a loop on a CPU, in bfloat16
BLOCK = 32  # rows; CPUs in 16 bits multiply multiples of it
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu}


class ExpertWeights(NamedTuple):
    """One tensor per matrix for the whole bank; `w_gate` and `b_gate` for swiglu only, biases all or none."""

    w_in: Float[Tensor, "experts hidden dim"]
    w_out: Float[Tensor, "experts dim hidden"]
    b_in: Float[Tensor, "experts hidden"] | None = None
    b_out: Float[Tensor, "experts dim"] | None = None
    w_gate: Float[Tensor, "experts hidden dim"] | None = None
    b_gate: Float[Tensor, "experts hidden"] | None = None


def experts(
    x: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows top_k"],
    weights: Float[Tensor, "rows top_k"],
    w_in: Float[Tensor, "experts hidden dim"],
    w_out: Float[Tensor, "experts dim hidden"],
    *,
    b_in: Float[Tensor, "experts hidden"] | None = None,
    b_out: Float[Tensor, "experts dim"] | None = None,
    w_gate: Float[Tensor, "experts hidden dim"] | None = None,
    b_gate: Float[Tensor, "experts hidden"] | None = None,
    activation: str = "gelu",
    backend: str = "auto",
) -> Float[Tensor, "rows dim"]:
    """y_i = sum_j weights_ij f(x_i), with f the MLP of expert expert_ids_ij.

    f(x) = w_out act(w_in x + b_in) + b_out, or, for swiglu, w_out (silu(w_gate x + b_gate) * (w_in x + b_in)) + b_out.
    The sum over j is accumulated in float32 (float64 for float64 weights).

    Args:
        expert_ids: a value of `experts` means "no expert": such a slot adds nothing and costs no product.
        backend: "loop" runs expert after expert and "batched" all in one padded product, for any dtype and width.
            "grouped" is one grouped product without a host sync; `dim` and `hidden` must fill multiples of 16 bytes.
            "auto": the fastest one that fits.

    Returns:
        In the dtype that `F.linear` would give here: that of `x`, or autocast's.

    Raises:
        ValueError: unknown activation or backend, or one that cannot run these widths or this dtype.
    """
    bank = ExpertWeights(w_in, w_out, b_in, b_out, w_gate, b_gate)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = _autocast(x, dtype)
        bank = bank._replace(**{name: _autocast(w, dtype) for name, w in bank._asdict().items() if w is not None})
    if weights.dtype != torch.float64:
        weights = weights.float()
    if backend == "auto":
        backend = fastest_backend(x, w_in.shape[1], activation, compiled=torch.compiler.is_compiling())
    return _checked_backend(backend)(x, expert_ids, weights, bank, _checked_activation(activation))


def loop_experts(
    x: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows top_k"],
    weights: Float[Tensor, "rows top_k"],
    bank: ExpertWeights,
    activation: str,
) -> Float[Tensor, "rows dim"]:
    """Expert after expert, each on its own slots. Waits for the device to learn how many those are.

    On CPUs in 16 bits its slots are filled up to a multiple of 32: a product of a shape not seen before costs a compilation
    in oneDNN, and with routing every expert would have a new one at every step. (Products of float32 are MKL's.)
    """
    order = order_slots(expert_ids, len(bank.w_in))
    ends = order.ends
    if x.device.type == "cpu" and x.dtype.itemsize == 2 and expert_ids.numel():
        ends = (num_blocks(order.sizes, BLOCK) * BLOCK).cumsum(0)
        order, _ = block_order(order, BLOCK)
    y = _mlp(dispatch(x, order), bank, activation, functools.partial(_linear_by_expert, ends=ends))
    return combine(y, weights, order)


def batched_experts(
    x: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows top_k"],
    weights: Float[Tensor, "rows top_k"],
    bank: ExpertWeights,
    activation: str,
) -> Float[Tensor, "rows dim"]:
    """One batched product: over experts padded to the fullest one where that has three times the mean at most, else over
    blocks of a quarter of the mean, with the weights copied to each block. Waits for the device to learn how many there are.

    In bfloat16 this is the fast one on CPUs where experts are small: few shapes occur, as in the padded loop, and few calls.
    """
    num_experts = len(bank.w_in)
    if not expert_ids.numel():
        return loop_experts(x, expert_ids, weights, bank, activation)
    order = order_slots(expert_ids, num_experts)
    mean = expert_ids.numel() / num_experts
    fullest = int(order.sizes.max())
    capacity = _multiple_of(BLOCK, fullest if fullest <= 3 * mean else mean / 4)
    order, block_experts = block_order(order, capacity)
    if len(block_experts) > num_experts:
        bank = bank._replace(
            **{n: w.index_select(0, block_experts) for n, w in bank._asdict().items() if w is not None}
        )
    rows = dispatch(x, order).view(len(block_experts), capacity, -1)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.transpose(1, 2)
        return torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)

    return combine(_mlp(rows, bank, activation, linear).flatten(0, 1), weights, order)


def grouped_experts(
    x: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows top_k"],
    weights: Float[Tensor, "rows top_k"],
    bank: ExpertWeights,
    activation: str,
) -> Float[Tensor, "rows dim"]:
    """`torch.nn.functional.grouped_mm` over the slots in expert order."""
    if problem := _grouped_problem(x.dtype, x.shape[1], bank.w_in.shape[1]):
        raise ValueError(problem)
    if x.is_cuda and x.dtype != torch.bfloat16 and torch.compiler.is_compiling():
        raise ValueError(f"backend 'grouped' cannot be compiled in {x.dtype}; use bfloat16 autocast, or backend 'loop'")
    order = order_slots(expert_ids, len(bank.w_in))

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = _grouped_mm(rows, weight.transpose(1, 2), order.ends)
        return product if bias is None else _AddBias.apply(product, bias, order.expert_ids, order.ends)

    return combine(_mlp(dispatch(x, order), bank, activation, linear), weights, order)


def _mlp(
    rows: Tensor, bank: ExpertWeights, activation: str, linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Tensor:
    """What every backend in torch does with rows in its order, by its own linear layers of a whole bank."""
    act = ACTIVATIONS[activation]
    hidden = linear(rows, bank.w_in, bank.b_in)
    hidden = act(hidden) if bank.w_gate is None else act(linear(rows, bank.w_gate, bank.b_gate)) * hidden
    return linear(hidden, bank.w_out, bank.b_out)


Backend = Callable[[Tensor, Tensor, Tensor, ExpertWeights, str], Tensor]
BACKENDS: dict[str, Backend] = {
    "loop": loop_experts,
    "batched": batched_experts,
    "grouped": grouped_experts,
    "triton": triton_experts,
}


class Experts(nn.Module):
    """A bank of `num_experts` MLPs of equal size.

    Each expert starts as an `nn.Linear` of its size would, so that the size of its output depends on neither width: a
    fixed standard deviation, as BEiT has it, would make the experts of narrow sub-tokens start almost silent.

    Raises:
        ValueError: unknown activation or backend, or widths that the "grouped" backend cannot run in bfloat16.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim is {hidden_dim}; choose a positive width")
        if backend == "grouped" and (problem := _grouped_problem(torch.bfloat16, dim, hidden_dim)):
            raise ValueError(problem)
        if backend != "auto":
            _checked_backend(backend)
        self.activation, self.backend = _checked_activation(activation), backend
        gated = activation == "swiglu"
        self.w_in = _uniform((num_experts, hidden_dim, dim), fan_in=dim)
        self.b_in = _uniform((num_experts, hidden_dim), fan_in=dim) if bias else None
        self.w_out = _uniform((num_experts, dim, hidden_dim), fan_in=hidden_dim)
        self.b_out = _uniform((num_experts, dim), fan_in=hidden_dim) if bias else None
        self.w_gate = _uniform((num_experts, hidden_dim, dim), fan_in=dim) if gated else None
        self.b_gate = _uniform((num_experts, hidden_dim), fan_in=dim) if gated and bias else None

    def forward(
        self,
        x: Float[Tensor, "rows dim"],
        expert_ids: Int[Tensor, "rows top_k"],
        weights: Float[Tensor, "rows top_k"],
    ) -> Float[Tensor, "rows dim"]:
        return experts(
            x,
            expert_ids,
            weights,
            self.w_in,
            self.w_out,
            b_in=self.b_in,
            b_out=self.b_out,
            w_gate=self.w_gate,
            b_gate=self.b_gate,
            activation=self.activation,
            backend=self.backend,
        )


@torch.library.custom_op("vlmoe::linear_by_expert", mutates_args=())
def _linear_by_expert(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """`F.linear` of rows in expert order, one product after another into one tensor; the tail is not written."""
    y = rows.new_empty(len(rows), weight.shape[1])
    biases = [None] * len(weight) if bias is None else bias.unbind()
    for w, b, (inputs, outputs) in zip(weight.mT.unbind(), biases, _by_expert(ends, rows, y), strict=False):
        if b is None:
            torch.mm(inputs, w, out=outputs)
        else:
            torch.addmm(b, inputs, w, out=outputs)
    return y


@_linear_by_expert.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[1])


@torch.library.custom_op("vlmoe::linear_by_expert_backward", mutates_args=())
def _linear_by_expert_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows, weight and bias (empty if there is none), each written once where it belongs."""
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    grad_bias = weight.new_empty(weight.shape[:2] if has_bias else 0)
    grad_biases = grad_bias.unbind() if has_bias else [None] * len(weight)
    parts = _by_expert(ends, grad, rows, grad_rows)
    for w, dw, db, (dy, x, dx) in zip(weight.unbind(), grad_weight.unbind(), grad_biases, parts, strict=False):
        torch.mm(dy, w, out=dx)
        torch.mm(dy.t(), x, out=dw)
        if db is not None:
            torch.sum(dy, 0, out=db)
    return grad_rows, grad_weight, grad_bias


@_linear_by_expert_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight), weight.new_empty(weight.shape[:2] if has_bias else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, bias, ends = inputs
    ctx.save_for_backward(rows, weight, ends)
    ctx.has_bias = bias is not None


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    rows, weight, bias = _linear_by_expert_backward(grad.contiguous(), *ctx.saved_tensors, ctx.has_bias)
    return rows, weight, bias if ctx.has_bias else None, None


_linear_by_expert.register_autograd(_gradients, setup_context=_keep)


def _by_expert(ends: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each expert's part of tensors in expert order, and at last the tail's. Cut at once: slices one by one took 2 to 3 % of a
    layer."""
    stops = ends.tolist()
    sizes = [stop - start for start, stop in zip([0, *stops], [*stops, len(tensors[0])], strict=True)]
    return zip(*(each.split(sizes) for each in tensors), strict=True)


class _AddBias(torch.autograd.Function):
    """Rows in expert order plus the bias of their expert; the gradient is one more grouped product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, expert_ids: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return rows + bias.index_select(0, expert_ids.clamp(max=len(bias) - 1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (ends,) = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        return grad, _sum_by_expert(grad, ends), None, None


@torch.library.custom_op("vlmoe::sum_by_expert", mutates_args=())
def _sum_by_expert(rows: Tensor, ends: Tensor) -> Tensor:
    """Of rows in expert order, [experts, dim]. An operator of its own, for a compiler would lay the ones out row by row, and
    a grouped product takes those only in groups of multiples of 16 bytes."""
    ones = rows.new_ones(len(rows), 8)  # 8 columns, as rows of a matrix must fill 16 bytes
    return _grouped_mm(ones.t(), rows, ends)[:, 0].contiguous()


@_sum_by_expert.register_fake
def _(rows: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(ends), rows.shape[1])


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return product(a, b, offs=ends)


def _grouped_problem(dtype: torch.dtype, dim: int, hidden_dim: int) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"backend 'grouped' cannot run {dtype}; use backend 'loop'"
    multiple = 16 // dtype.itemsize
    for name, width in (("dim of a row", dim), ("hidden_dim", hidden_dim)):
        if width % multiple:
            nearest = max(multiple, round(width / multiple) * multiple)
            return (
                f"backend 'grouped' needs multiples of {multiple} in {dtype}: change {name} from {width} to {nearest}, "
                "or use backend 'loop'"
            )
    return None


def fastest_backend(x: Tensor, hidden_dim: int, activation: str, *, compiled: bool) -> str:
    """What "auto" takes, as measured (docs/benchmarks)."""
    if x.device.type not in ("cpu", "cuda") or _grouped_problem(x.dtype, x.shape[1], hidden_dim):
        return "loop"
    if x.device.type == "cuda":
        is_bf16 = x.dtype == torch.bfloat16  # torch compiles grouped products in no other dtype
        widest = 128 if activation == "swiglu" else 256
        if triton_problem(x, hidden_dim) is None and (x.shape[1] <= widest or not is_bf16):
            return "triton"
        return "grouped" if is_bf16 else "loop"
    if x.dtype == torch.float32:
        return "loop"
    if compiled:  # the others would break its graph
        return "grouped"
    return "batched" if x.shape[1] * hidden_dim < SMALL else "loop"


def _checked_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _checked_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    return name


def _multiple_of(step: int, least: float) -> int:
    return step * max(1, math.ceil(least / step))


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))
