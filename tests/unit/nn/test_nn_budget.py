"""Parameters and FLOPs against the layers themselves and against the numbers of both MH-MoE papers."""

import itertools

import pytest

from vlmoe.nn import MHMoE, MoE
from vlmoe.nn.budget import (
    Cost,
    dense_cost,
    flops_parity_hidden_dim,
    mhmoe_cost,
    moe_cost,
    params_parity_hidden_dim,
    params_parity_num_experts,
)

LAYERS, DIM = 12, 768


def size(module: MHMoE | MoE) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("gate", ["linear", "xmoe", "torchscale"])
@pytest.mark.parametrize(("bias", "shared_dim"), [(True, None), (False, 40), (True, 40)])
def test_parameters_are_those_of_the_layers(activation: str, gate: str, bias: bool, shared_dim: int | None) -> None:
    switches = {"activation": activation, "gate": gate, "bias": bias, "shared_dim": shared_dim}
    sizes = {"dim": 32, "hidden_dim": 24, "num_experts": 6, "top_k": 2}
    assert moe_cost(**sizes, **switches).params == size(MoE(**sizes, **switches))
    for split, merge in itertools.product(range(4), range(4)):
        layers = {"num_heads": 4, "num_split_layers": split, "num_merge_layers": merge}
        assert mhmoe_cost(**sizes, **layers, **switches).params == size(MHMoE(**sizes, **layers, **switches))


def test_active_parameters_and_router_flops() -> None:
    cost = mhmoe_cost(32, 24, 100, 2, 4, bias=False, num_split_layers=0, num_merge_layers=0)
    assert cost.active_params == 4 * 2 * 2 * 8 * 24 + 100 * 8
    few = mhmoe_cost(32, 24, 3, 2, 4, bias=False, num_split_layers=0, num_merge_layers=0)
    assert few.active_params == few.params
    counted = mhmoe_cost(32, 24, 100, 2, 4, bias=False, num_split_layers=0, num_merge_layers=0, count_router=True)
    assert counted.flops - cost.flops == 2 * 4 * 8 * 100
    assert counted.params == cost.params
    assert 2 * cost + cost == cost * 3 == Cost(3 * cost.params, 3 * cost.active_params, 3 * cost.flops)


def test_language_models_of_paper_1() -> None:
    """Table 11: 12 layers, vocabulary of 100,277; X-MoE has experts in 6 of them, MH-MoE adds split and merge there."""
    attention_and_norms = 4 * (DIM * DIM + DIM) + 4 * DIM
    ffn = dense_cost(DIM, 4 * DIM)
    dense = LAYERS * (attention_and_norms + ffn.params) + 100_277 * DIM + 2 * DIM
    assert dense == pytest.approx(162.07e6, abs=5e3)
    without_experts = dense - 6 * ffn.params
    assert without_experts == pytest.approx(133.73e6, abs=5e3)
    one = mhmoe_cost(DIM, 3072, 8, 2, 4)
    projections = one.params - mhmoe_cost(DIM, 3072, 8, 2, 4, num_split_layers=0, num_merge_layers=0).params
    assert without_experts + 6 * projections == pytest.approx(140.82e6, abs=5e3)
    table = {8: 227e6, 16: 454e6, 32: 908e6, 64: 1_815e6, 128: 3_631e6, 256: 7_263e6}
    for num_experts, printed in table.items():
        assert (6 * moe_cost(DIM, 3072, num_experts, 2)).params == pytest.approx(printed, rel=5e-3)


def test_expert_width_of_paper_1_at_equal_parameters() -> None:
    """beta of section 1 of the complexity analysis, for hidden width 4 * beta * h * d of the experts and h = 4."""
    betas = {8: 0.969, 16: 0.985, 32: 0.992, 64: 0.996, 128: 0.998, 256: 0.999}
    for num_experts, beta in betas.items():
        smoe = moe_cost(DIM, 4 * DIM, num_experts, 2, bias=False)
        hidden_dim = params_parity_hidden_dim(
            Cost(smoe.params - 2 * 2 * DIM, smoe.active_params, smoe.flops),  # the projections' biases
            dim=DIM,
            num_experts=num_experts,
            num_heads=4,
            bias=False,
            multiple_of=1,
        )
        assert hidden_dim / (4 * 4 * DIM) == pytest.approx(beta, abs=6e-4)
    paper_1 = mhmoe_cost(DIM, 4 * 4 * DIM, 8, 2, 4)
    assert paper_1.flops / moe_cost(DIM, 4 * DIM, 8, 2).flops == pytest.approx(4.06, abs=0.07)  # not at equal FLOPs


def test_five_models_of_paper_2_cost_the_same() -> None:
    swiglu = {"activation": "swiglu", "bias": False}
    dense = dense_cost(DIM, 2048, **swiglu)
    smoe = moe_cost(DIM, 2048, 8, 1, **swiglu)
    models = [
        dense,
        smoe,
        moe_cost(DIM, 1024, 16, 2, **swiglu),
        mhmoe_cost(DIM, 768, 40, 2, 2, **swiglu),
        mhmoe_cost(DIM, 512, 96, 3, 3, **swiglu),
    ]
    assert {model.flops for model in models} == {9_437_184}
    for top_k, hidden_dim, num_heads, num_experts in ((2, 768, 2, 41), (3, 512, 3, 93)):
        assert flops_parity_hidden_dim(smoe, dim=DIM, top_k=top_k, activation="swiglu") == hidden_dim
        found = params_parity_num_experts(smoe, dim=DIM, hidden_dim=hidden_dim, num_heads=num_heads, **swiglu)
        assert found == num_experts
    fine_grained = flops_parity_hidden_dim(
        dense, dim=DIM, top_k=2, activation="swiglu", num_split_layers=0, num_merge_layers=0
    )
    assert fine_grained == 1024


def test_worked_example_of_paper_2() -> None:
    """Two matrices, d_moe = 4d, k = 1, h = 3: d_mhmoe = 3d and four times the experts less one."""
    smoe = moe_cost(DIM, 4 * DIM, 8, 1, bias=False)
    assert flops_parity_hidden_dim(smoe, dim=DIM, top_k=1) == 3 * DIM
    assert params_parity_num_experts(smoe, dim=DIM, hidden_dim=3 * DIM, num_heads=3, bias=False) == 4 * 8 - 1


def test_answers_are_the_nearest_multiples() -> None:
    target = dense_cost(96, 384)
    for multiple_of in (1, 8, 48):
        found = flops_parity_hidden_dim(target, dim=96, top_k=2, shared_dim=16, multiple_of=multiple_of)
        distance = [
            abs(mhmoe_cost(96, width, 9, 2, 4, shared_dim=16).flops - target.flops)
            for width in range(multiple_of, 2000, multiple_of)
        ]
        assert found == multiple_of * (1 + distance.index(min(distance)))


def test_a_target_below_the_fixed_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="raise the target, or take fewer split and merge layers"):
        flops_parity_hidden_dim(dense_cost(96, 64), dim=96, top_k=2, num_split_layers=3)
