"""The router's choice, weights and capacity, and the losses over them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmoe.nn import Routing, TopKRouter, load_balancing_loss, router_z_loss
from vlmoe.nn.router import GATES


def routing_of(logits: Tensor, top_k: int, is_padding: Tensor | None = None) -> Routing:
    weights, expert_ids = logits.softmax(-1).topk(top_k)
    kept = None if is_padding is None else ~is_padding[:, None].expand(-1, top_k)
    return Routing(logits, weights, expert_ids, kept, is_padding)


def even_choices(num_experts: int, top_k: int, rows: int) -> Routing:
    """Equal probabilities, and every expert chosen equally often."""
    expert_ids = torch.arange(rows * top_k).view(rows, top_k) % num_experts
    return Routing(torch.zeros(rows, num_experts), torch.ones(rows, top_k) / num_experts, expert_ids, None, None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("top_k", "normalize", "total"), [(1, None, None), (3, None, 1), (3, False, None), (1, True, 1)]
)
def test_weights_are_probabilities_of_the_best_experts(
    gate: str, top_k: int, normalize: bool | None, total: float | None
) -> None:
    router = TopKRouter(16, 6, top_k, normalize_weights=normalize, gate=gate)
    routing = router(torch.randn(20, 16))
    best = routing.probs.sort(descending=True)
    assert torch.equal(routing.expert_ids, best.indices[:, :top_k])
    expected = best.values[:, :top_k]
    torch.testing.assert_close(routing.weights, expected / expected.sum(1, keepdim=True) if total else expected)
    if top_k == 1 and total:
        assert torch.equal(routing.weights, torch.ones(20, 1))
    assert routing.kept is None and routing.load.sum() == 20 * top_k


@pytest.mark.parametrize("gate", GATES)
def test_logits_have_full_precision_under_autocast(gate: str) -> None:
    router, x = TopKRouter(16, 6, 2, gate=gate), torch.randn(20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.logits, router(x).logits)
    assert router(x.bfloat16()).logits.dtype == torch.float32
    assert router(x.double()).logits.dtype == torch.float64


def test_xmoe_logits_are_cosines_over_a_temperature() -> None:
    router, x = TopKRouter(16, 6, 1, gate="xmoe"), torch.randn(20, 16)
    logits = router(x).logits
    assert logits.abs().max() <= 1 / 0.3 + 1e-5
    torch.testing.assert_close(router(1000 * x).logits, logits)
    assert router.gate.embeddings.shape == (6, 3)


def test_torchscale_embeddings_act_by_direction_and_learn_as_if_of_norm_one_and_a_half() -> None:
    router, x = TopKRouter(16, 6, 1, gate="torchscale"), torch.randn(20, 16)
    logits = router(x).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), router.gate.embeddings)
    with torch.no_grad():
        router.gate.embeddings *= 1.5 / router.gate.embeddings.norm(dim=1, keepdim=True)
    rescaled = router(x).logits
    torch.testing.assert_close(rescaled, logits)
    torch.testing.assert_close(torch.autograd.grad(rescaled.square().sum(), router.gate.embeddings)[0], gradient)
    projected = x @ router.gate.projection.T
    torch.testing.assert_close(logits, projected @ router.gate.embeddings.T / 1.5)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 30),
    num_experts=st.integers(2, 6),
    top_k=st.integers(1, 2),
    capacity_factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 8.0, 1e30]),
)
def test_capacity_is_a_queue(seed: int, rows: int, num_experts: int, top_k: int, capacity_factor: float) -> None:
    torch.manual_seed(seed)
    router = TopKRouter(8, num_experts, top_k, capacity_factor=capacity_factor)
    is_padding = torch.rand(rows) < 0.3
    routing = router(torch.randn(rows, 8), is_padding)
    real = int((~is_padding).sum())
    room = [min(top_k * -int(-capacity_factor * real // num_experts), top_k * rows)] * num_experts
    kept = torch.zeros_like(routing.expert_ids, dtype=torch.bool)
    for choice in range(top_k):
        for row in range(rows):
            e = int(routing.expert_ids[row, choice])
            if not is_padding[row] and room[e] > 0:
                kept[row, choice] = True
                room[e] -= 1
    assert torch.equal(routing.kept, kept)
    assert torch.equal(routing.weights > 0, kept)
    assert torch.equal(routing.load, torch.bincount(routing.expert_ids[kept], minlength=num_experts))


@pytest.mark.parametrize("capacity_factor", [0.0, -1.0, math.inf, math.nan])
def test_a_capacity_that_is_none_is_refused(capacity_factor: float) -> None:
    with pytest.raises(ValueError, match="None to drop nothing"):
        TopKRouter(8, 4, 2, capacity_factor=capacity_factor)


def test_load_balancing_loss_at_its_ends() -> None:
    for num_experts, top_k in ((4, 1), (4, 2), (6, 3)):
        torch.testing.assert_close(load_balancing_loss(even_choices(num_experts, top_k, 12)), torch.tensor(1.0))
        collapsed = torch.full((9, num_experts), -1e4)
        collapsed[:, :top_k] = 0
        loss = load_balancing_loss(routing_of(collapsed, top_k))
        torch.testing.assert_close(loss, torch.tensor(num_experts / top_k))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), num_experts=st.integers(2, 8), top_k=st.integers(1, 2))
def test_load_balancing_loss_of_like_rows_is_at_least_one(seed: int, num_experts: int, top_k: int) -> None:
    """Rows that all choose the experts they find most probable: no share can beat the even one (Chebyshev)."""
    logits = torch.randn(1, num_experts, generator=torch.manual_seed(seed)).expand(5, -1)
    assert load_balancing_loss(routing_of(logits, top_k)) >= 1 - 1e-6


def test_losses_over_probabilities_and_logits_leave_padding_out() -> None:
    logits = torch.randn(8, 5, requires_grad=True)
    is_padding = torch.tensor([False, True] * 4)
    for loss in (load_balancing_loss, router_z_loss):
        value = loss(routing_of(logits, 2, is_padding))
        torch.testing.assert_close(value, loss(routing_of(logits[~is_padding], 2)))
        (gradient,) = torch.autograd.grad(value, logits)
        assert not gradient[is_padding].any() and gradient[~is_padding].abs().sum() > 0
    torch.testing.assert_close(router_z_loss(routing_of(torch.zeros(3, 4), 1)), torch.tensor(4.0).log() ** 2)


def test_load_balancing_loss_counts_choices_that_capacity_dropped() -> None:
    x = torch.randn(16, 8)
    limited = TopKRouter(8, 4, 2, capacity_factor=0.25)
    dropless = TopKRouter(8, 4, 2)
    dropless.load_state_dict(limited.state_dict())
    assert limited(x).load.sum() < dropless(x).load.sum()
    assert torch.equal(load_balancing_loss(limited(x)), load_balancing_loss(dropless(x)))


def test_gradient_steps_on_the_balancing_loss_even_out_the_load() -> None:
    router = TopKRouter(8, 4, 1)
    x = torch.randn(256, 8) + 1
    with torch.no_grad():
        router.gate.weight[0] += 0.3
    before = router(x).load.max()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        load_balancing_loss(router(x)).backward()
        optimizer.step()
    assert before > 200 and router(x).load.max() < 128
