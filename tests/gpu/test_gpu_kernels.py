"""The Triton kernels on a GPU, against a loop in float64: `pytest -m gpu tests/gpu`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmoe.nn import MHMoE
from vlmoe.nn.experts import ACTIVATIONS, Experts, experts
from vlmoe.nn.router import load_balancing_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("w_in", "w_out", "b_in", "b_out", "w_gate", "b_gate")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next is full of NaN, so an element that nothing writes shows."""
    blocks = [torch.full((64 << 20,), torch.nan, device="cuda") for _ in range(8)]
    blocks += [torch.full((n,), torch.nan, device="cuda") for n in (64, 4096, 60_000, 200_000) for _ in range(16)]
    del blocks


def oracle(x: Tensor, ids: Tensor, weights: Tensor, bank: dict[str, Tensor], activation: str) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(len(bank["w_in"])):
        row, j = (ids == e).nonzero(as_tuple=True)
        one = {name: w[e] for name, w in bank.items()}
        hidden = F.linear(x[row], one["w_in"], one.get("b_in"))
        if activation == "swiglu":
            hidden = F.silu(F.linear(x[row], one["w_gate"], one.get("b_gate"))) * hidden
        else:
            hidden = ACTIVATIONS[activation](hidden)
        y = y.index_add(0, row, weights[row, j, None] * F.linear(hidden, one["w_out"], one.get("b_out")))
    return y


def draw(rows, dim, hidden, E, top_k, activation="gelu", bias=True, dtype=torch.bfloat16, skew=0.0, padding=0.0):
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    scores = torch.rand(rows, E, device="cuda") - skew * torch.arange(E, device="cuda")
    ids = scores.topk(top_k).indices
    ids = torch.where(torch.rand(rows, 1, device="cuda") < padding, E, ids)
    bank = {"w_in": normal(E, hidden, dim, scale=dim**-0.5), "w_out": normal(E, dim, hidden, scale=hidden**-0.5)}
    if bias:
        bank |= {"b_in": normal(E, hidden), "b_out": normal(E, dim)}
    if activation == "swiglu":
        bank |= {"w_gate": normal(E, hidden, dim, scale=dim**-0.5)} | ({"b_gate": normal(E, hidden)} if bias else {})
    return normal(rows, dim), ids, torch.rand(rows, top_k, device="cuda"), bank, normal(rows, dim)


def run(function, x, ids, weights, bank, dy, dtype=None) -> dict[str, Tensor]:
    """Output and all gradients, by name."""
    leaves = {"x": x, "weights": weights, **bank}
    leaves = {name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in leaves.items()}
    y = function(leaves["x"], ids, leaves["weights"], {name: leaves[name] for name in bank})
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items()}


def with_backend(backend: str, activation: str = "gelu"):
    def function(x, ids, weights, bank):
        w_in, w_out, *_ = bank.values()
        rest = {name: bank[name] for name in NAMES[2:] if name in bank}
        return experts(x, ids, weights, w_in, w_out, **rest, activation=activation, backend=backend)

    return function


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


CASES = [
    {"rows": 4096, "dim": 192, "hidden": 1152, "E": 32, "top_k": 2},
    {"rows": 5001, "dim": 192, "hidden": 1152, "E": 8, "top_k": 2, "skew": 0.2, "padding": 0.3},
    {"rows": 4099, "dim": 128, "hidden": 576, "E": 32, "top_k": 3},
    {"rows": 3001, "dim": 256, "hidden": 1536, "E": 8, "top_k": 2},
    {"rows": 1234, "dim": 384, "hidden": 768, "E": 8, "top_k": 1},
    {"rows": 8191, "dim": 64, "hidden": 256, "E": 256, "top_k": 2},
    {"rows": 77, "dim": 96, "hidden": 80, "E": 256, "top_k": 1},
    {"rows": 2000, "dim": 96, "hidden": 400, "E": 1, "top_k": 1},
    {"rows": 3000, "dim": 112, "hidden": 144, "E": 8, "top_k": 2, "skew": 1.0},
    {"rows": 3000, "dim": 336, "hidden": 208, "E": 8, "top_k": 3},
    {"rows": 40_000, "dim": 192, "hidden": 1152, "E": 32, "top_k": 2, "skew": 0.01},
    {"rows": 1, "dim": 64, "hidden": 64, "E": 32, "top_k": 2},
    {"rows": 130, "dim": 128, "hidden": 64, "E": 3, "top_k": 1, "padding": 0.5},
    {"rows": 999, "dim": 256, "hidden": 192, "E": 7, "top_k": 3},
    {"rows": 20_001, "dim": 192, "hidden": 128, "E": 1, "top_k": 1},
    {"rows": 3000, "dim": 96, "hidden": 1536, "E": 256, "top_k": 1, "skew": 0.02},
]


@pytest.mark.parametrize("shape", CASES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(
    "activation, bias, dtype",
    [
        ("gelu", True, torch.bfloat16),
        ("relu", False, torch.float16),
        ("swiglu", True, torch.bfloat16),
    ],
)
def test_equal_to_a_float64_loop_and_no_worse_than_grouped(shape, activation, bias, dtype):
    drawn = draw(**shape, activation=activation, bias=bias, dtype=dtype)
    want = run(lambda *a: oracle(*a, activation), *drawn, dtype=torch.float64)
    got = run(with_backend("triton", activation), *drawn)
    grouped = run(with_backend("grouped", activation), *drawn)
    for name in want:
        ours, theirs = error(got[name], want[name]), error(grouped[name], want[name])
        assert ours <= 1e-2, (name, ours)
        assert ours <= 1.1 * theirs + 1e-4, (name, ours, theirs)


def test_two_runs_agree_to_the_bit():
    drawn = draw(rows=20_000, dim=192, hidden=1152, E=32, top_k=3)
    first, second = (run(with_backend("triton"), *drawn) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_waits_for_the_device_never():
    drawn = draw(rows=3000, dim=192, hidden=1152, E=32, top_k=2)
    run(with_backend("triton"), *drawn)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(with_backend("triton"), *drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dim, activation", [(192, "gelu"), (128, "swiglu")])
def test_other_numbers_of_rows_compile_nothing(dim, activation, monkeypatch):
    import triton

    def once(rows: int) -> None:
        run(with_backend("triton", activation), *draw(rows, dim, hidden=768, E=8, top_k=2, activation=activation))

    for rows in (3000, 3001, 4000, 16):  # Triton asks what is a multiple of 16, and what is 1
        once(rows)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **found: compiled.append(found["repr"]))
    for rows in (1000, 1001, 8000, 9123, 30_000):
        once(rows)
    assert not compiled


def test_tensors_that_begin_anywhere():
    """In memory: asynchronous copies want multiples of 16 bytes."""
    drawn = draw(rows=300, dim=192, hidden=128, E=4, top_k=2)
    want = run(with_backend("triton"), *drawn)

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].view_as(tensor).copy_(tensor)

    x, ids, weights, bank, dy = drawn
    got = run(with_backend("triton"), moved(x), ids, moved(weights), {n: moved(w) for n, w in bank.items()}, moved(dy))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dim, activation", [(192, "gelu"), (256, "gelu"), (96, "swiglu")])
def test_a_row_that_is_not_finite_reaches_its_own_experts_only(dim, activation):
    x, ids, weights, bank, dy = draw(rows=1000, dim=dim, hidden=128, E=8, top_k=2, activation=activation)
    ids[1:][ids[1:] == 0] = 8
    ids[0] = torch.tensor([0, 8])  # it alone meets expert 0, which it alone meets
    want = run(with_backend("triton", activation), x, ids, weights, bank, dy)
    for tensor in (x, weights, dy):
        tensor[0] = torch.nan
    got = run(with_backend("triton", activation), x, ids, weights, bank, dy)
    assert all(torch.equal(got[name][1:], want[name][1:]) and got[name][0].isnan().any() for name in want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_kernels_run_where_their_tensors_are():
    layer, x = (
        MHMoE(dim=384, hidden_dim=256, num_experts=4, top_k=2, num_heads=2).bfloat16(),
        torch.randn(64, 384).bfloat16(),
    )
    first, second = (copy.deepcopy(layer).to(device)(x.to(device))[0].cpu() for device in ("cuda:0", "cuda:1"))
    assert torch.equal(first, second)


def test_no_rows_and_no_kept_rows():
    x, ids, weights, bank, dy = draw(rows=50, dim=192, hidden=1152, E=4, top_k=2)
    got = run(with_backend("triton"), x[:0], ids[:0], weights[:0], bank, dy[:0])
    assert got["w_in"].abs().max() == 0
    got = run(with_backend("triton"), x, torch.full_like(ids, 4), weights, bank, dy)
    assert all(t.abs().max() == 0 for t in got.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_checkpointing_and_compile(compiled):
    from torch.utils.checkpoint import checkpoint

    layer = Experts(192, 1152, 8, backend="triton").cuda()
    plain = Experts(192, 1152, 8, backend="grouped").cuda()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2000, 192, device="cuda")
    ids, weights = torch.rand(2000, 8, device="cuda").topk(2).indices, torch.rand(2000, 2, device="cuda")
    function = torch.compile(layer, fullgraph=True) if compiled else layer
    grads = []
    for call in (lambda *a: checkpoint(function, *a, use_reentrant=False), plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = call(leaf, ids, weights)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        grads.append(leaf.grad)
    assert error(grads[0], grads[1].double()) < 1e-2
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert error(ours.grad, theirs.grad.double()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [192, 320])
def test_auto_compiles_in_any_dtype(dim, dtype):
    torch.compiler.reset()
    layer = Experts(dim, 256, 4).cuda().to(dtype)
    x, ids, weights, _, _ = draw(100, dim, 256, 4, 2, dtype=dtype)
    y = torch.compile(layer, fullgraph=True)(x, ids, weights)
    assert error(y, layer.double()(x.double(), ids, weights)) < 2e-3


@pytest.mark.parametrize("backend", ["triton", "grouped"])
def test_a_whole_layer_compiled_is_the_layer(backend):
    torch.manual_seed(0)
    layer = MHMoE(dim=384, hidden_dim=256, num_experts=30, top_k=2, num_heads=3, backend=backend).cuda()
    x, grad = torch.randn(4, 500, 384, device="cuda"), torch.randn(4, 500, 384, device="cuda")
    found = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y, routing = function(leaf)
            loss = (y * grad).sum() + load_balancing_loss(routing)
        found.append(torch.autograd.grad(loss, [leaf, *layer.parameters()]))
    for eager, compiled in zip(*found, strict=True):
        assert error(compiled, eager.double()) < 2e-2


def test_sixteen_million_slots():
    rows = 8 << 20
    x, ids, weights, bank, _ = draw(rows=rows, dim=192, hidden=64, E=8, top_k=2)
    with torch.no_grad():
        y = with_backend("triton")(x, ids, weights, bank)
        part = slice(rows - 1000, rows)
        want = with_backend("grouped")(x[part], ids[part], weights[part], bank)
    assert error(y[part], want.double()) < 1e-2
    assert y.isfinite().all()


@pytest.mark.parametrize("rows, E, top_k", [(262_144, 32, 2), (1001, 7, 3), (3, 256, 1), (70_000, 256, 4)])
def test_routing_equals_topk_and_stable_argsort(rows, E, top_k):
    from vlmoe.nn.kernels import routing_ops

    logits = torch.randn(rows, E, device="cuda").requires_grad_()
    probs, ids = routing_ops.top_k_softmax(logits, top_k)
    twin = logits.detach().clone().requires_grad_()
    want_ids = twin.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(ids, want_ids)
    want = twin.softmax(-1).gather(1, want_ids)
    torch.testing.assert_close(probs, want, rtol=1e-5, atol=1e-7)
    grad = torch.randn_like(probs)
    probs.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-4, atol=1e-6)
    ids[::3] = E
    order, ends = routing_ops.order_slots(ids, E)
    flat = ids.flatten()
    kept = int((flat < E).sum())
    assert torch.equal(order[:kept].long(), flat.argsort(stable=True)[:kept])
    assert torch.equal(ends.long(), flat.bincount(minlength=E + 1)[:E].cumsum(0))
    assert torch.equal(routing_ops.count_slots(ids, E), flat.bincount(minlength=E + 1)[:E])


@pytest.mark.parametrize("rows, dim", [(5001, 3072), (1, 8192), (70_000, 200), (0, 64)])
@pytest.mark.parametrize("compiled", [False, True])
def test_linear_gelu_and_norm(rows, dim, compiled):
    from vlmoe.nn.kernels import linear_gelu_norm

    linear, norm = nn.Linear(32, dim), nn.LayerNorm(dim, eps=1e-5)
    for vector in (linear.bias, norm.weight, norm.bias):
        nn.init.normal_(vector)
    twins = [linear.to("cuda"), norm.to("cuda")], [copy.deepcopy(each).double() for each in (linear, norm)]
    x = torch.randn(rows, 32, device="cuda").bfloat16()
    fast, slow = x.clone().requires_grad_(), x.double().requires_grad_()
    function = torch.compile(linear_gelu_norm, fullgraph=True) if compiled else linear_gelu_norm
    with torch.autocast("cuda", torch.bfloat16):
        y = function(fast, *twins[0])
    want = twins[1][1](F.gelu(twins[1][0](slow)))
    assert y.dtype == torch.bfloat16
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad.double())
    wrt = [(fast, slow), *zip(*([p for module in twin for p in module.parameters()] for twin in twins), strict=True)]
    for found, expected in [(y, want), *((a.grad, b.grad) for a, b in wrt)]:
        assert (found - expected).norm() <= 5e-3 * expected.norm()


def test_gelu_and_its_norm_beyond_32_bits():
    from vlmoe.nn.kernels import norm_ops

    x = torch.randn(1_000_000, 2304, device="cuda", dtype=torch.bfloat16).requires_grad_()
    one = torch.ones(2304, device="cuda")
    y, _, _ = norm_ops.gelu_norm(x, one, one, one, 1e-5)
    y.backward(x.detach())
    last = x.detach()[-9:].double().requires_grad_()
    want = F.layer_norm(F.gelu(last + 1), (2304,), one.double(), one.double(), 1e-5)
    want.backward(last.detach())
    assert (y[-9:] - want).norm() <= 5e-3 * want.norm()
    assert (x.grad[-9:] - last.grad).norm() <= 5e-3 * last.grad.norm()


@pytest.mark.parametrize("rows, dim, factors", [(50_432, 768, 256), (4608, 768, 4608), (1001, 1024, 0), (7, 8192, 7)])
@pytest.mark.parametrize("adds, dtype", [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("compiled", [False, True])
def test_residual_sum_and_norm(rows, dim, factors, adds, dtype, compiled):
    from vlmoe.nn.kernels import add_norm

    norm = nn.LayerNorm(dim, eps=1e-5)
    for vector in norm.parameters():
        nn.init.normal_(vector)
    norms = norm.cuda(), copy.deepcopy(norm).double().cuda()
    inputs = torch.randn(rows, dim, device="cuda").to(dtype), torch.randn(rows, dim, device="cuda").bfloat16()
    factor = torch.rand(factors, device="cuda") if factors else None
    probes = torch.randn(2, rows, dim, device="cuda").bfloat16()
    torch.compiler.reset()  # the limit of variants is low
    function = torch.compile(add_norm, fullgraph=True) if compiled else add_norm
    found = []
    for norm, leaves in zip(norms, ([t.clone() for t in inputs], [t.double() for t in inputs]), strict=True):
        x, y = (leaf.requires_grad_() for leaf in leaves)
        if x.dtype == torch.float64:
            added = y if factor is None else y * factor.repeat_interleave(rows // factors)[:, None]
            total = x + added if adds else x * 1
            normed = norm(total)
        else:
            with torch.autocast("cuda", torch.bfloat16):
                total, normed = function(x, y if adds else None, norm, factor if adds else None)
            assert normed.dtype == torch.bfloat16 and total.dtype == dtype
        torch.autograd.backward([total, normed], [probes[0].to(total.dtype), probes[1].to(normed.dtype)])
        found.append([total, normed, x.grad, *([y.grad] if adds else []), *(p.grad for p in norm.parameters())])
    for ours, right in zip(*found, strict=True):
        assert error(ours, right) <= 5e-3


@pytest.mark.parametrize(
    "B, num_vision, most, heads, head_dim",
    [(16, 197, 40, 12, 64), (3, 577, 64, 4, 64), (40, 0, 64, 3, 64), (5, 50, 0, 2, 32), (70_000, 0, 4, 1, 16)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_over_parts(B, num_vision, most, heads, head_dim, dtype):
    from vlmoe.nn.attention import attend_in_parts
    from vlmoe.nn.packing import packing

    width, shapes = 3 * heads * head_dim, {"vision": (B, num_vision)}
    lengths = torch.randint(0, most + 1, (B,))
    padding = torch.arange(most).expand(B, most) >= lengths[:, None]
    at = (~padding).flatten().nonzero()[:, 0]
    packed = packing(F.pad(at, (0, 5), value=-1).cuda(), padding.cuda()) if most else None
    shapes |= {"text": (1, len(at) + 5)} if most else {}
    inputs = {m: torch.randn(*shape, width, device="cuda").to(dtype) for m, shape in shapes.items() if shape[1]}
    fast = {m: t.clone().requires_grad_() for m, t in inputs.items()}
    slow = {m: t.double().requires_grad_() for m, t in inputs.items()}
    found = attend_in_parts(fast, packed, heads)
    whole = [slow["vision"]] if num_vision else []
    whole += [packed.unpack(slow["text"])] if most else []
    q, k, v = torch.cat(whole, 1).view(B, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.transpose(-2, -1) * head_dim**-0.5
    if most:
        scores = scores.masked_fill(~packed.visible(num_vision), torch.finfo(scores.dtype).min)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    wants = {"vision": y[:, :num_vision]} if num_vision else {}
    wants |= {"text": packed.pack(y[:, num_vision:])} if most else {}
    probes = [torch.randn_like(found[m]) for m in found]
    torch.autograd.backward(list(found.values()), probes)
    torch.autograd.backward(list(wants.values()), [probe.double() for probe in probes])
    for m in found:
        assert found[m].dtype == dtype
        assert error(found[m], wants[m]) <= 5e-3 and error(fast[m].grad, slow[m].grad) <= 5e-3, m


@pytest.mark.parametrize(
    "rows, dim, E, top_k",
    [
        (262_144, 192, 32, 2),
        (4099, 256, 32, 2),
        (4097, 128, 7, 3),
        (3000, 112, 33, 1),
        (70, 64, 64, 4),
        (1, 256, 32, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gate_is_a_product_in_float32(rows, dim, E, top_k, dtype, compiled):
    """All of the router: gate, softmax and top-k, and the rows that it hands on to the experts."""
    from vlmoe.nn.router import TopKRouter

    torch.compiler.reset()  # the limit of variants is low
    router = TopKRouter(dim, E, top_k, normalize_weights=False).cuda().to(dtype)
    weight, x = router.gate.weight, torch.randn(rows, dim, device="cuda").bfloat16().requires_grad_()

    def route(x):
        routing, rows = router.route(x)
        return routing.logits, routing.weights, routing.expert_ids, rows

    logits, probs, ids, same_x = (torch.compile(route, fullgraph=True) if compiled else route)(x)
    slow_x, slow_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    want = F.linear(slow_x, slow_weight)
    want_probs = want.softmax(-1).gather(1, ids)
    assert logits.dtype == torch.float32
    assert error(logits, want) <= 1e-6 and error(probs, want_probs) <= 3e-6 and torch.equal(same_x, x)
    top = want.sort(descending=True).values
    settled = top[:, top_k - 1] - top[:, top_k] > 1e-5  # the others are decided by rounding
    assert torch.equal(ids[settled].sort().values, want.topk(top_k).indices[settled].sort().values)
    grads = [torch.randn_like(t) for t in (logits, probs, same_x)]
    torch.autograd.backward([logits, probs, same_x], grads)
    torch.autograd.backward([want, want_probs, slow_x], [g.double() for g in grads])
    for ours, right in ((x, slow_x), (weight, slow_weight)):
        assert ours.grad.dtype == ours.dtype
        assert error(ours.grad, right.grad) <= 1.01 * error(right.grad.to(ours.dtype), right.grad) + 2e-5
