"""The Triton kernels in Triton's interpreter on the CPU, in float16 (it multiplies no bfloat16), small shapes.

Triton decides at its import whether kernels are interpreted, so these tests run in a process of their own.
`tests/gpu/test_gpu_kernels.py` holds the same kernels, compiled, to the same oracle.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the first test starts")
NAMES = ("w_in", "w_out", "b_in", "b_out", "w_gate", "b_gate")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the GPU tests cover compiled kernels")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    here = Path(__file__).resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", str(here)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=here.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def oracle(x: Tensor, expert_ids: Tensor, weights: Tensor, bank: dict[str, Tensor], activation: str) -> Tensor:
    """One slot after another."""
    rows = []
    for row, ids, scales in zip(x, expert_ids.tolist(), weights, strict=True):
        y = torch.zeros_like(row)
        for e, scale in zip(ids, scales, strict=True):
            if e < len(bank["w_in"]):
                one = {name: w[e] for name, w in bank.items()}
                hidden = F.linear(row, one["w_in"], one.get("b_in"))
                if activation == "swiglu":
                    hidden = F.silu(F.linear(row, one["w_gate"], one.get("b_gate"))) * hidden
                else:
                    hidden = F.gelu(hidden) if activation == "gelu" else F.relu(hidden)
                y = y + scale * F.linear(hidden, one["w_out"], one.get("b_out"))
        rows.append(y)
    return torch.stack(rows)


@interpreted
@pytest.mark.parametrize(
    "rows, dim, hidden, E, top_k, activation, bias",
    [
        (37, 48, 80, 3, 2, "gelu", True),
        (150, 32, 32, 2, 1, "relu", False),
        (29, 112, 48, 5, 3, "swiglu", True),
        (20, 192, 64, 4, 1, "gelu", False),
    ],
)
def test_output_and_gradients_are_those_of_a_float64_loop(
    rows: int, dim: int, hidden: int, E: int, top_k: int, activation: str, bias: bool
) -> None:
    from vlmoe.nn.experts import experts

    torch.manual_seed(rows)
    bank = {"w_in": torch.randn(E, hidden, dim) / dim**0.5, "w_out": torch.randn(E, dim, hidden) / hidden**0.5}
    if bias:
        bank |= {"b_in": torch.randn(E, hidden), "b_out": torch.randn(E, dim)}
    if activation == "swiglu":
        bank |= {"w_gate": torch.randn(E, hidden, dim) / dim**0.5, "b_gate": torch.randn(E, hidden)}
    half = {"x": torch.randn(rows, dim), "weights": torch.rand(rows, top_k)} | bank
    half = {name: t if name == "weights" else t.half() for name, t in half.items()}
    expert_ids = torch.rand(rows, E + 1).topk(top_k).indices  # the last one is "no expert"
    dy = torch.randn(rows, dim).half()

    fast = {name: t.clone().requires_grad_() for name, t in half.items()}
    rest = {name: fast[name] for name in NAMES[2:] if name in fast}
    y = experts(
        fast["x"], expert_ids, fast["weights"], fast["w_in"], fast["w_out"], **rest, activation=activation,
        backend="triton",
    )  # fmt: skip
    y.backward(dy)
    slow = {name: t.double().requires_grad_() for name, t in half.items()}
    want = oracle(slow["x"], expert_ids, slow["weights"], {name: slow[name] for name in bank}, activation)
    want.backward(dy.double())
    for name, got, right in [("y", y, want)] + [(name, fast[name].grad, slow[name].grad) for name in half]:
        assert (got - right).norm() <= 2e-3 * right.norm(), name


@interpreted
def test_rows_without_experts_and_no_rows() -> None:
    from vlmoe.nn.experts import experts

    x, w_in, w_out = torch.randn(5, 16).half(), torch.randn(2, 16, 16).half(), torch.randn(2, 16, 16).half()
    leaves = [t.requires_grad_() for t in (x, w_in, w_out)]
    experts(x, torch.full((5, 1), 2), torch.rand(5, 1), w_in, w_out, backend="triton").sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in leaves)
    assert experts(x[:0], torch.zeros(0, 1).long(), torch.rand(0, 1), w_in, w_out, backend="triton").shape == (0, 16)


@interpreted
def test_chunks_with_experts_that_have_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their parts of a weight gradient have places too."""
    from vlmoe.nn.experts import experts
    from vlmoe.nn.kernels import configs

    monkeypatch.setattr(configs, "CHUNK_BYTES", 1)
    x, w_in, w_out = torch.randn(8, 16).half(), torch.randn(16, 32, 16).half(), torch.randn(16, 16, 32).half()
    ids, weights = torch.tensor([0, 1, 14, 15] * 2)[:, None], torch.rand(8, 1)
    dy, leaves = torch.randn(8, 16).half(), [t.requires_grad_() for t in (x, w_in, w_out)]
    got, want = (
        torch.autograd.grad(experts(x, ids, weights, w_in, w_out, backend=backend), leaves, dy)
        for backend in ("triton", "loop")
    )
    for ours, right in zip(got, want, strict=True):
        torch.testing.assert_close(ours, right, atol=2e-2, rtol=1e-2)


@interpreted
def test_second_derivatives_are_refused() -> None:
    from vlmoe.nn.experts import experts

    x, w_in, w_out = (
        torch.randn(5, 16).half().requires_grad_(),
        torch.randn(2, 16, 16).half(),
        torch.randn(2, 16, 16).half(),
    )
    y = experts(x, torch.zeros(5, 1).long(), torch.rand(5, 1), w_in, w_out, backend="triton")
    with pytest.raises(RuntimeError, match="create_graph"):
        y.sum().backward(create_graph=True)


@interpreted
@pytest.mark.parametrize("counts, segment", [((3, 0, 4), 2), ((0, 0, 5), 9), ((1, 1, 1), 1)])
def test_weight_gradients_are_the_sums_of_their_experts_parts(counts: tuple[int, ...], segment: int) -> None:
    """Tiles in expert order are cut into segments, and the part of expert e in segment s lies at place s + e."""
    from vlmoe.nn.kernels import expert_mlp_backward

    E, hidden, dim = len(counts), 80, 48
    base = torch.tensor([0, *counts]).cumsum(0)
    places = -(-int(base[-1]) // segment) + E
    parts = torch.full((2, places, hidden * dim + hidden), torch.nan)
    want = torch.zeros(2, E, hidden * dim + hidden)
    for e in range(E):
        for s in {tile // segment for tile in range(int(base[e]), int(base[e + 1]))}:
            parts[:, s + e] = torch.randn_like(parts[:, 0])
            want[:, e] += parts[:, s + e]
    dw_in, dw_out, db_in = (torch.full(n, torch.nan) for n in ((E, hidden, dim), (E, dim, hidden), (E, hidden)))
    expert_mlp_backward.finish_segments[(2, E, 2)](
        parts, base.int(), dw_in, dw_out, db_in, segment, places, hidden, dim, True, 64, 64
    )
    matrices = want[:, :, : hidden * dim].view(2, E, hidden, dim)
    torch.testing.assert_close(dw_in, matrices[0])
    torch.testing.assert_close(dw_out, matrices[1].transpose(1, 2))
    torch.testing.assert_close(db_in, want[0, :, hidden * dim :])


@interpreted
@pytest.mark.parametrize(
    "blocks, multiprocessors, segments", [(18, 132, 22), (24, 132, 11), (16, 132, 8), (200, 132, 1)]
)
def test_segments_fill_the_multiprocessors(blocks: int, multiprocessors: int, segments: int) -> None:
    from vlmoe.nn.kernels import configs

    assert configs.segments(blocks, multiprocessors) == segments


@interpreted
@pytest.mark.parametrize("rows, E, top_k", [(300, 7, 3), (40, 32, 2), (9, 1, 1)])
def test_routing_is_top_k_and_a_stable_sort(rows: int, E: int, top_k: int) -> None:
    from vlmoe.nn.kernels import routing_ops

    torch.manual_seed(rows)
    logits = torch.randn(rows, E)
    logits[::4] = logits[::4].round()  # ties
    fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    probs, ids = routing_ops.top_k_softmax(fast, top_k)
    want_ids = logits.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(ids, want_ids)
    want = slow.softmax(-1).gather(1, want_ids)
    torch.testing.assert_close(probs, want)
    grad = torch.randn_like(probs)
    probs.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(fast.grad, slow.grad)

    ids[::5] = E
    order, ends = routing_ops.order_slots(ids, E)
    flat = ids.flatten()
    kept = int((flat < E).sum())
    assert torch.equal(order[:kept].long(), flat.argsort(stable=True)[:kept])
    assert torch.equal(ends.long(), flat.bincount(minlength=E + 1)[:E].cumsum(0))
    assert torch.equal(routing_ops.count_slots(ids, E), ends.long().diff(prepend=ends.new_zeros(1)))


@interpreted
@pytest.mark.parametrize("rows, dim", [(37, 48), (3, 200), (0, 16)])
def test_bias_gelu_and_norm(rows: int, dim: int) -> None:
    from vlmoe.nn.kernels import norm_ops

    torch.manual_seed(rows)
    inputs = torch.randn(rows, dim).half(), torch.randn(dim), torch.randn(dim), torch.randn(dim)
    grad = torch.randn(rows, dim).half()
    fast = [each.clone().requires_grad_() for each in inputs]
    slow = [each.double().requires_grad_() for each in inputs]
    y = norm_ops.gelu_norm(*fast, 1e-5)[0]
    want = F.layer_norm(F.gelu(slow[0] + slow[1]), (dim,), *slow[2:], 1e-5)
    y.backward(grad)
    want.backward(grad.double())
    for found, expected in [(y, want), *((a.grad, b.grad) for a, b in zip(fast, slow, strict=True))]:
        assert (found - expected).norm() <= 2e-3 * expected.norm()


@interpreted
@pytest.mark.parametrize("rows, dim, factors", [(37, 48, 0), (12, 200, 4), (3, 96, 3), (0, 16, 0)])
@pytest.mark.parametrize("dtype, adds", [(torch.float32, True), (torch.float32, False), (torch.float16, True)])
def test_residual_sum_and_norm(rows: int, dim: int, factors: int, dtype: torch.dtype, adds: bool) -> None:
    from vlmoe.nn.kernels import norm_ops

    torch.manual_seed(rows)
    inputs = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).half(), torch.randn(dim), torch.randn(dim)
    factor = torch.rand(factors) if adds and factors else None
    grads = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).half()
    fast, slow = ([leaf(each) for each in inputs] for leaf in (Tensor.requires_grad_, _doubled))
    total, normed, _, _ = norm_ops.add_norm(fast[0], fast[1] if adds else None, factor, *fast[2:], 1e-5, torch.float16)
    added = slow[1] if factor is None else slow[1] * factor.double().repeat_interleave(rows // factors)[:, None]
    want = slow[0] + added if adds else slow[0] * 1
    want_normed = F.layer_norm(want, (dim,), *slow[2:], 1e-5)
    torch.autograd.backward([total if adds else fast[0] * 1, normed], [each.clone() for each in grads])
    torch.autograd.backward([want, want_normed], [each.double() for each in grads])
    assert adds or not total.numel()
    pairs = [(normed, want_normed), *((a.grad, b.grad) for a, b in zip(fast, slow, strict=True) if b.grad is not None)]
    for found, expected in [*pairs, *([(total, want)] if adds else [])]:
        assert found is not None and expected is not None
        assert (found - expected).norm() <= 1e-3 * expected.norm()


@interpreted
@pytest.mark.parametrize(
    "num_vision, lengths, heads, head_dim",
    [(17, (5, 0), 2, 16), (70, (9,), 1, 32), (0, (7, 66, 2), 2, 16), (30, (0, 0), 1, 64)],
)
def test_attention_over_parts(num_vision: int, lengths: tuple[int, ...], heads: int, head_dim: int) -> None:
    """Sample after sample in float64; two rows of text before, and three behind, belong to none."""
    from vlmoe.nn.kernels.attention_ops import attend_parts

    torch.manual_seed(num_vision)
    width, B = heads * head_dim, len(lengths)
    ends = 2 + torch.tensor(lengths).cumsum(0)
    spans = torch.stack([ends - torch.tensor(lengths), ends], 1).int()
    inputs = torch.randn(B, num_vision, 3 * width).half(), torch.randn(1, int(ends[-1]) + 3, 3 * width).half()
    fast, slow = ([leaf(each) for each in inputs] for leaf in (Tensor.requires_grad_, _doubled))
    *found, _ = attend_parts(*fast, spans, heads, num_vision + max(lengths))
    wants = [torch.zeros(B, num_vision, width).double(), torch.zeros(1, inputs[1].shape[1], width).double()]
    for b, (first, end) in enumerate(spans.tolist()):
        rows = torch.cat([slow[0][b], slow[1][0, first:end]]).view(-1, 3, heads, head_dim)
        y = F.scaled_dot_product_attention(*rows.permute(1, 2, 0, 3).unbind(0)).transpose(0, 1).flatten(1)
        wants[0][b], wants[1][0, first:end] = y[:num_vision], y[num_vision:]
    grads = [torch.randn_like(each) for each in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(wants, [each.double() for each in grads])
    for got, want in [*zip(found, wants, strict=True), *((a.grad, b.grad) for a, b in zip(fast, slow, strict=True))]:
        assert got is not None and want is not None and got.isfinite().all()
        assert (got - want).norm() <= 1e-3 * want.norm()


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


@interpreted
@pytest.mark.parametrize("given", ["all", "logits", "probs", "rows"])
@pytest.mark.parametrize(
    "rows, dim, E, top_k",
    [(150, 48, 5, 2), (9, 192, 32, 2), (70, 112, 20, 3), (0, 16, 3, 1), (260, 128, 7, 7), (150, 256, 32, 1)],
)
def test_the_gate_is_a_product_in_float32(rows: int, dim: int, E: int, top_k: int, given: str) -> None:
    """With the top-k of its softmax. Gradients reach it by all its outputs, or by some."""
    from vlmoe.nn.kernels import gate_top_k

    torch.manual_seed(rows)
    x, weight = torch.randn(rows, dim).half(), torch.randn(E, dim) * 0.02
    fast_x, fast_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits, probs, ids, same_x = gate_top_k(fast_x, fast_weight, top_k)
    slow_x, slow_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    want = F.linear(slow_x, slow_weight)
    assert torch.equal(ids, logits.argsort(dim=1, descending=True, stable=True)[:, :top_k])
    want_probs = want.softmax(-1).gather(1, ids)
    assert (logits - want).norm() <= 1e-5 * want.norm()  # parts of float16, which is narrower than bfloat16
    assert (probs - want_probs).norm() <= 1e-5 * want_probs.norm()
    assert torch.equal(same_x, x)

    pairs = {"logits": (logits, want), "probs": (probs, want_probs), "rows": (same_x, slow_x)}
    grads = {name: torch.randn_like(ours) for name, (ours, _) in pairs.items() if given in (name, "all")}
    torch.autograd.backward([pairs[name][0] for name in grads], list(grads.values()))
    torch.autograd.backward([pairs[name][1] for name in grads], [grad.double() for grad in grads.values()])
    assert fast_x.grad is not None and slow_x.grad is not None and fast_x.grad.dtype == x.dtype
    assert (fast_x.grad - slow_x.grad).norm() <= 1e-3 * slow_x.grad.norm()  # rounded to 16 bits
    wanted = torch.zeros_like(slow_weight) if slow_weight.grad is None else slow_weight.grad
    assert fast_weight.grad is not None and (fast_weight.grad - wanted).norm() <= 1e-5 * wanted.norm()


@interpreted
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_checkpointing_and_one_graph(compiled: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    from vlmoe.nn.experts import Experts

    torch.manual_seed(0)
    layer = Experts(32, 32, 3, backend="triton")
    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(20, 32, requires_grad=True)
    ids, weights = torch.rand(20, 3).topk(2).indices, torch.rand(20, 2)
    grads = []
    for call in (function, lambda *a: checkpoint(function, *a, use_reentrant=False)):
        with torch.autocast("cpu", torch.float16):
            y = call(x, ids, weights)
        assert y.dtype == torch.float16
        grads.append(torch.autograd.grad(y.float().square().mean(), [x, *layer.parameters()]))
    for first, second in zip(*grads, strict=True):
        assert first.dtype == torch.float32
        assert torch.equal(first, second)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_a_compiler_expects_of_each_operator_is_what_it_returns(dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides: compiled code asserts them."""
    from vlmoe.nn.kernels import attention_ops, norm_ops, ops, routing_ops

    def check(operator: Any, *arguments: Any) -> Any:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        return operator(*arguments)

    x, gate = torch.randn(20, 32).half(), torch.randn(3, 32).to(dtype)
    logits, probs, ids = check(routing_ops.gate_top_k, x, gate, 2)
    check(routing_ops.gate_top_k_backward, x, gate, logits, ids, torch.randn(20, 3), None, x.t().contiguous().t())
    check(
        routing_ops.gate_top_k_backward, x.t().contiguous().t(), gate, logits, ids, None, torch.randn(2, 20).t(), None
    )
    probs, ids = check(routing_ops.top_k_softmax, logits, 2)
    check(routing_ops.top_k_softmax_backward, logits, ids, torch.randn(2, 20).t())
    check(routing_ops.count_slots, ids.t(), 3)
    y, means, scales = check(norm_ops.gelu_norm, x, gate[0], gate[1], gate.t()[:, 0], 1e-5)
    check(norm_ops.gelu_norm_backward, y.t().contiguous().t(), x, gate[0], gate[1], means, scales)
    for added in (x.t().contiguous().t(), None):
        factor = torch.ones(5) if added is not None else None
        total, normed, *stats = check(norm_ops.add_norm, x.float(), added, factor, gate[0], gate[1], 1e-5, x.dtype)
        total = x.float() if added is None else total
        d_total = None if added is None else total.t().contiguous().t()
        check(norm_ops.add_norm_backward, normed, d_total, total, factor, gate[0], *stats, x.dtype)
    check(norm_ops.add_norm, x[:0], x[:0], torch.ones(0), gate[0], gate[1], 1e-5, x.dtype)
    parts = torch.randn(2, 3, 48).half(), torch.randn(1, 4, 48).half(), torch.tensor([[0, 3], [3, 3]]).int()
    *outputs, sums = check(attention_ops.attend_parts, *parts, 1, 6)
    odd = torch.empty(parts[1].numel() + 1).half()[1:].view_as(parts[1]).copy_(parts[1])  # not at a multiple of 16
    assert torch.equal(attention_ops.attend_parts(parts[0], odd, parts[2], 1, 6)[1], outputs[1])
    check(attention_ops.attend_parts_backward, *outputs, *parts, *outputs, sums, 6)
    order, ends = check(routing_ops.order_slots, ids, 3)
    bank = [torch.randn(3, 16, 32).half(), torch.randn(3, 32, 16).half(), torch.randn(3, 16).half()]
    bank += [torch.randn(3, 32).half(), torch.randn(3, 16, 32).half(), torch.randn(3, 16).half()]
    for gated, activation in ((bank, "swiglu"), ([*bank[:4], None, None], "gelu")):
        inputs = (x, ids, probs, order, ends, *gated, activation)
        _, *tiles = check(ops.expert_mlp, *inputs)
        check(ops.expert_mlp_backward, torch.randn(32, 20).half().t(), *tiles, *inputs)


def test_a_cpu_is_no_gpu() -> None:
    from vlmoe.nn.kernels import triton_problem

    assert INTERPRETED or "needs a GPU" in (triton_problem(torch.zeros(2, 64).half(), 64) or "")


@interpreted
@pytest.mark.parametrize(
    "x, hidden, words",
    [
        (torch.zeros(2, 64), 64, "float32"),
        (torch.zeros(2, 40).half(), 64, "16 to 384"),
        (torch.zeros(2, 64).half(), 40, "hidden_dim"),
    ],
)
def test_what_the_kernels_cannot_run_is_said(x: Tensor, hidden: int, words: str) -> None:
    from vlmoe.nn.kernels import triton_problem

    problem = triton_problem(x, hidden)
    assert problem is not None and words in problem
