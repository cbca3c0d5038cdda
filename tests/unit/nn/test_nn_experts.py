"""Every backend of `experts` against a slot-by-slot reference in float64, and what grouped products leave undefined."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmoe.nn import Experts, experts
from vlmoe.nn.dispatch import order_slots
from vlmoe.nn.experts import BACKENDS, fastest_backend

ON_CPU = [name for name in BACKENDS if name != "triton"]  # test_kernels.py has that one
DIM, HIDDEN = 16, 24


def reference(x: Tensor, expert_ids: Tensor, weights: Tensor, bank: dict[str, Tensor], activation: str) -> Tensor:
    rows = []
    for i, chosen in enumerate(expert_ids.tolist()):
        y = torch.zeros_like(x[i])
        for j, e in enumerate(chosen):
            if e == len(bank["w_in"]):
                continue
            own = {name: each[e] for name, each in bank.items()}
            hidden = own["w_in"] @ x[i] + own.get("b_in", 0)
            if activation == "swiglu":
                hidden = F.silu(own["w_gate"] @ x[i] + own.get("b_gate", 0)) * hidden
            else:
                hidden = getattr(F, activation)(hidden)
            y = y + weights[i, j] * (own["w_out"] @ hidden + own.get("b_out", 0))
        rows.append(y)
    return torch.stack(rows)


def build(
    activation: str, bias: bool, expert_ids: Tensor, num_experts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Inputs that are exact in `dtype`, in float64."""
    module = Experts(DIM, HIDDEN, num_experts, activation=activation, bias=bias)
    bank = {name: value.detach().to(dtype).double() for name, value in module.named_parameters()}
    x = torch.randn(len(expert_ids), DIM).to(dtype).double()
    return x, torch.rand(expert_ids.shape).double(), bank


def run_with_gradients(
    function: Any, x: Tensor, weights: Tensor, bank: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    inputs = {"x": x.to(dtype), "weights": weights.to(torch.promote_types(dtype, torch.float32))}
    inputs |= {name: value.to(dtype) for name, value in bank.items()}
    inputs = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    leaves = dict(inputs)
    y = function(inputs.pop("x"), inputs.pop("weights"), inputs)
    assert y.dtype == dtype
    probe = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().to(dtype)
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), probe), strict=True))}


def assert_all_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, expected in wanted.items():
        error = (found[name].double() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error}"


IDS = {
    "even": torch.arange(24).view(12, 2) % 4,
    "one expert takes all": torch.zeros(9, 1, dtype=torch.long),
    "some slots have no expert": torch.tensor([[0, 4, 1], [4, 4, 4], [3, 0, 4], [1, 3, 0], [4, 3, 1]]),
}


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("loop", torch.float64, 1e-10),
        ("loop", torch.float32, 1e-5),
        ("loop", torch.bfloat16, 2e-2),
        ("grouped", torch.float32, 1e-5),
        ("grouped", torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_equals_reference_forward_and_backward(
    activation: str, bias: bool, ids: str, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    expert_ids = IDS[ids]
    x, weights, bank = build(activation, bias, expert_ids, 4, dtype)
    wanted = run_with_gradients(
        lambda x, weights, bank: reference(x, expert_ids, weights, bank, activation), x, weights, bank, torch.float64
    )
    found = run_with_gradients(
        lambda x, weights, bank: experts(x, expert_ids, weights, **bank, activation=activation, backend=backend),
        x,
        weights,
        bank,
        dtype,
    )
    assert_all_close(found, wanted, tolerance)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("expert_ids", [torch.zeros(0, 2, dtype=torch.long), torch.full((3, 2), 4)])
def test_nothing_to_compute_gives_zeros(backend: str, expert_ids: Tensor) -> None:
    x, weights, bank = build("gelu", True, expert_ids, 4, torch.float32)
    found = run_with_gradients(
        lambda x, weights, bank: experts(x, expert_ids, weights, **bank, backend=backend),
        x,
        weights,
        bank,
        torch.float32,
    )
    assert all(not each.any() for each in found.values())


class _PoisonedGroupedMM(torch.autograd.Function):
    """A grouped product whose undefined rows, of the output and of the input's gradient, are NaN."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, ends)
        return _poison(F.grouped_mm(a, b, offs=ends), ends)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, ends = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_a = F.grouped_mm(grad, b.transpose(1, 2), offs=ends)
        return _poison(grad_a, ends), F.grouped_mm(a.t(), grad, offs=ends), None


def _poison(product: Tensor, ends: Tensor) -> Tensor:
    if product.dim() == 2:
        product[ends[-1] :] = torch.nan
    return product


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_uninitialised_memory_does_not_leak(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expert_ids = IDS["some slots have no expert"]
    x, weights, bank = build(activation, True, expert_ids, 4, torch.float32)
    wanted = run_with_gradients(
        lambda x, weights, bank: reference(x, expert_ids, weights, bank, activation), x, weights, bank, torch.float64
    )
    monkeypatch.setattr(sys.modules["vlmoe.nn.experts"], "_grouped_mm", _PoisonedGroupedMM.apply)
    found = run_with_gradients(
        lambda x, weights, bank: experts(x, expert_ids, weights, **bank, activation=activation, backend="grouped"),
        x,
        weights,
        bank,
        torch.float32,
    )
    assert_all_close(found, wanted, 1e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda e: st.tuples(st.just(e), st.lists(st.lists(st.integers(0, e), min_size=2, max_size=2), max_size=20))
    )
)
def test_order_of_slots(drawn: tuple[int, list[list[int]]]) -> None:
    num_experts, rows = drawn
    expert_ids = torch.tensor(rows, dtype=torch.long).view(-1, 2)
    order = order_slots(expert_ids, num_experts)
    flat = expert_ids.flatten().tolist()
    assert order.slots.tolist() == sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert order.slots[order.places.flatten()].tolist() == list(range(len(flat)))
    assert order.ends.tolist() == [sum(e <= last for e in flat) for last in range(num_experts)]


@pytest.mark.parametrize("backend", ["auto", *ON_CPU])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_linear(backend: str, x_dtype: torch.dtype) -> None:
    module = Experts(DIM, HIDDEN, 4, backend=backend)
    x = torch.randn(12, DIM, dtype=x_dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, IDS["even"], torch.ones(12, 2))
        assert y.dtype == F.linear(x, module.w_out[0].t()).dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == x_dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "loop"), (torch.bfloat16, "batched")])
def test_auto_takes_the_fast_backend_of_a_cpu(dtype: torch.dtype, backend: str) -> None:
    expert_ids = torch.arange(256).view(128, 2) % 4
    x, weights, bank = build("gelu", True, expert_ids, 4, dtype)
    inputs = (x.to(dtype), expert_ids, weights)
    bank = {name: value.to(dtype) for name, value in bank.items()}
    assert torch.equal(experts(*inputs, **bank), experts(*inputs, **bank, backend=backend))


@pytest.mark.parametrize(
    ("dtype", "hidden_dim", "backend"),
    [(torch.float32, 288, "loop"), (torch.bfloat16, 288, "batched"), (torch.bfloat16, 576, "loop")],
)
def test_what_a_cpu_runs_fastest(dtype: torch.dtype, hidden_dim: int, backend: str) -> None:
    assert fastest_backend(torch.zeros(1, 96, dtype=dtype), hidden_dim, "gelu", compiled=False) == backend


@pytest.mark.parametrize("autocast", [False, True])
def test_auto_runs_what_grouped_products_cannot(autocast: bool) -> None:
    module = Experts(5, 7, 4).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(torch.randn(12, 5, dtype=torch.float64), IDS["even"], torch.ones(12, 2))
    assert y.dtype == torch.float64


@pytest.mark.parametrize(
    ("dtype", "dim", "hidden", "message"),
    [
        (torch.float64, 16, 24, "cannot run torch.float64; use backend 'loop'"),
        (torch.float32, 16, 26, "multiples of 4 in torch.float32: change hidden_dim from 26 to 24"),
        (torch.bfloat16, 12, 24, "multiples of 8 in torch.bfloat16: change dim of a row from 12 to 16"),
    ],
)
def test_grouped_says_which_number_to_change(dtype: torch.dtype, dim: int, hidden: int, message: str) -> None:
    w_in, w_out = torch.zeros(4, hidden, dim, dtype=dtype), torch.zeros(4, dim, hidden, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        experts(torch.zeros(12, dim, dtype=dtype), IDS["even"], torch.ones(12, 2), w_in, w_out, backend="grouped")


def test_each_expert_starts_like_a_linear_layer_of_its_size() -> None:
    module = Experts(64, 16, 50)
    for parameter, fan_in in ((module.w_in, 64), (module.b_in, 64), (module.w_out, 16), (module.b_out, 16)):
        bound = fan_in**-0.5
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert abs(parameter.std() / (bound / 3**0.5) - 1) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_grouped_on_a_gpu_equals_reference_without_waiting_for_it(activation: str, bias: bool, ids: str) -> None:
    expert_ids = IDS[ids]
    x, weights, bank = build(activation, bias, expert_ids, 4, torch.bfloat16)
    wanted = run_with_gradients(
        lambda x, weights, bank: reference(x, expert_ids, weights, bank, activation), x, weights, bank, torch.float64
    )
    on_gpu = {name: value.bfloat16().cuda().requires_grad_() for name, value in {"x": x, **bank}.items()}
    on_gpu["weights"] = weights.float().cuda().requires_grad_()
    inputs, gpu_ids = dict(on_gpu), expert_ids.cuda()
    probe = torch.linspace(-1, 1, x.numel()).view_as(x).bfloat16().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = experts(inputs.pop("x"), gpu_ids, inputs.pop("weights"), **inputs, activation=activation, backend="grouped")
        gradients = torch.autograd.grad(y, list(on_gpu.values()), probe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = {"y": y, **dict(zip(on_gpu, gradients, strict=True))}
    assert_all_close({name: value.cpu() for name, value in found.items()}, wanted, 2e-2)
