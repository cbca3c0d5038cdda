"""Parameters and FLOPs of feed-forward layers, and the sizes that make two of them equal.

FLOPs are those of one token's forward pass, a multiply-add counting as two, in the convention of the MH-MoE papers:
weight products only, so no biases, activations, softmax or combine, and no router unless `count_router` asks for it.
Parameters are all there are, biases and router included.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    params: int
    active_params: int  # parameters that one token can touch
    flops: int  # per token, forward

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.params + other.params, self.active_params + other.active_params, self.flops + other.flops)

    def __mul__(self, layers: int) -> "Cost":
        return Cost(self.params * layers, self.active_params * layers, self.flops * layers)

    __rmul__ = __mul__


def dense_cost(dim: int, hidden_dim: int, *, activation: str = "gelu", bias: bool = True) -> Cost:
    """One MLP: two matrices, or three for swiglu."""
    matrices = _matrices(activation)
    params = matrices * dim * hidden_dim + bias * ((matrices - 1) * hidden_dim + dim)
    return Cost(params, params, 2 * matrices * dim * hidden_dim)


def moe_cost(
    dim: int,
    hidden_dim: int,
    num_experts: int,
    top_k: int,
    *,
    activation: str = "gelu",
    bias: bool = True,
    gate: str = "linear",
    shared_dim: int | None = None,
    count_router: bool = False,
) -> Cost:
    """`vlmoe.nn.MoE`."""
    return mhmoe_cost(
        dim,
        hidden_dim,
        num_experts,
        top_k,
        1,
        activation=activation,
        bias=bias,
        gate=gate,
        num_split_layers=0,
        num_merge_layers=0,
        shared_dim=shared_dim,
        count_router=count_router,
    )


def mhmoe_cost(
    dim: int,
    hidden_dim: int,
    num_experts: int,
    top_k: int,
    num_heads: int,
    *,
    activation: str = "gelu",
    bias: bool = True,
    gate: str = "linear",
    num_split_layers: int = 1,
    num_merge_layers: int = 1,
    shared_dim: int | None = None,
    count_router: bool = False,
) -> Cost:
    """`vlmoe.nn.MHMoE`. A token's sub-tokens can touch up to num_heads * top_k different experts."""
    sub_dim = dim // num_heads
    expert = dense_cost(sub_dim, hidden_dim, activation=activation, bias=bias)
    touched = min(num_experts, num_heads * top_k)
    bank = Cost(num_experts * expert.params, touched * expert.params, num_heads * top_k * expert.flops)
    router = _router_cost(sub_dim, num_experts, gate, num_heads * count_router)
    projection = Cost(dim * dim + dim, dim * dim + dim, 2 * dim * dim)
    total = bank + router + projection * (num_split_layers + num_merge_layers)
    return total if shared_dim is None else total + dense_cost(dim, shared_dim, activation=activation, bias=bias)


def flops_parity_hidden_dim(
    target: Cost,
    *,
    dim: int,
    top_k: int,
    activation: str = "gelu",
    num_split_layers: int = 1,
    num_merge_layers: int = 1,
    shared_dim: int | None = None,
    multiple_of: int = 8,
) -> int:
    """Hidden width at which a token's FLOPs come nearest to `target` (arXiv:2411.16205, eq. 8), router not counted.

    It depends neither on the number of experts nor on that of heads. For an MoE on whole tokens set `num_split_layers`
    and `num_merge_layers` to 0.

    Args:
        multiple_of: the answer is a multiple of it. 8 is what grouped products in bfloat16 need; 64 runs faster.

    Raises:
        ValueError: the layer costs more than `target` whatever the width of its experts, or top_k is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; choose 1 or more")

    def flops(hidden_dim: int) -> int:
        return mhmoe_cost(
            dim,
            hidden_dim,
            top_k,
            top_k,
            1,
            activation=activation,
            num_split_layers=num_split_layers,
            num_merge_layers=num_merge_layers,
            shared_dim=shared_dim,
        ).flops

    return _nearest(flops, target.flops, multiple_of, "FLOPs")


def params_parity_hidden_dim(
    target: Cost,
    *,
    dim: int,
    num_experts: int,
    num_heads: int = 1,
    activation: str = "gelu",
    bias: bool = True,
    gate: str = "linear",
    num_split_layers: int = 1,
    num_merge_layers: int = 1,
    shared_dim: int | None = None,
    multiple_of: int = 8,
) -> int:
    """Hidden width at which the parameters come nearest to `target`; arguments as in `flops_parity_hidden_dim`."""

    def params(hidden_dim: int) -> int:
        return mhmoe_cost(
            dim,
            hidden_dim,
            num_experts,
            1,
            num_heads,
            activation=activation,
            bias=bias,
            gate=gate,
            num_split_layers=num_split_layers,
            num_merge_layers=num_merge_layers,
            shared_dim=shared_dim,
        ).params

    return _nearest(params, target.params, multiple_of, "parameters")


def params_parity_num_experts(
    target: Cost,
    *,
    dim: int,
    hidden_dim: int,
    num_heads: int = 1,
    activation: str = "gelu",
    bias: bool = True,
    gate: str = "linear",
    num_split_layers: int = 1,
    num_merge_layers: int = 1,
    shared_dim: int | None = None,
    multiple_of: int = 1,
) -> int:
    """Number of experts at which the parameters come nearest to `target` (arXiv:2411.16205, eq. 9)."""

    def params(num_experts: int) -> int:
        return mhmoe_cost(
            dim,
            hidden_dim,
            num_experts,
            1,
            num_heads,
            activation=activation,
            bias=bias,
            gate=gate,
            num_split_layers=num_split_layers,
            num_merge_layers=num_merge_layers,
            shared_dim=shared_dim,
        ).params

    return _nearest(params, target.params, multiple_of, "parameters")


def _matrices(activation: str) -> int:
    return 3 if activation == "swiglu" else 2


def _router_cost(dim: int, num_experts: int, gate: str, rows: int) -> Cost:
    gate_dim = {"linear": 0, "xmoe": max(2, num_experts // 2), "torchscale": 16}[gate]
    weights = gate_dim * (dim + num_experts) if gate_dim else dim * num_experts
    params = weights + (gate == "xmoe")  # its temperature
    return Cost(params, params, 2 * weights * rows)


def _nearest(cost_of: Callable[[int], int], target: int, step: int, what: str) -> int:
    """The multiple of `step` whose cost, which grows with it, is nearest to `target`; the lower one of two."""
    if (fixed := cost_of(0)) >= target:
        raise ValueError(
            f"the layer has {fixed:,} {what} without its experts and the target only {target:,}: "
            "raise the target, or take fewer split and merge layers or a narrower shared expert"
        )
    low, high = 1, 2
    while cost_of(high * step) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_of(middle * step) < target else (low, middle)
    return min(low, high, key=lambda each: abs(cost_of(each * step) - target)) * step
