"""MoE on whole tokens: what it adds to router and experts. Values are tested with MHMoE, of which it is the core."""

import torch

from vlmoe.nn import MoE

SIZES = {"dim": 16, "hidden_dim": 24, "num_experts": 4, "top_k": 2}


def test_output_is_the_routed_sum_plus_the_shared_expert() -> None:
    layer = MoE(**SIZES, shared_dim=8, activation="swiglu")
    x = torch.randn(2, 5, 16)
    y, routing = layer(x)
    rows = x.view(10, 16)
    routed = layer.experts(rows, routing.expert_ids, routing.weights)
    torch.testing.assert_close(y, routed.view(2, 5, 16) + layer.shared(x))
    assert routing.logits.shape == (10, 4)


def test_padding_passes_no_routed_expert() -> None:
    layer = MoE(**SIZES)
    x = torch.randn(2, 5, 16)
    x[0, 3:] = torch.nan
    is_padding = torch.zeros(2, 5, dtype=torch.bool)
    is_padding[0, 3:] = True
    y, routing = layer(x, is_padding)
    assert not y[0, 3:].any() and y[~is_padding].isfinite().all()
    assert routing.load.sum() == 2 * 8


def test_bias_switch_reaches_every_expert() -> None:
    names = {name for name, _ in MoE(**SIZES, bias=False, shared_dim=8, activation="swiglu").named_parameters()}
    assert not any("bias" in name or ".b_" in name for name in names)


def test_experts_share_parameters_with_nothing_and_all_learn() -> None:
    layer = MoE(**SIZES, gate="xmoe", shared_dim=8, activation="swiglu")
    y, _ = layer(torch.randn(64, 16))
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
