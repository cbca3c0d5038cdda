"""Multi-head mixture of experts: each token is split into sub-tokens that are routed apart, and merged again.

Axes: `...` any leading axes, flattened to `tokens`; `dim` of a token; `rows` = tokens * num_heads sub-tokens of width
dim / num_heads, token-major: the sub-tokens of one token are neighbours.
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlmoe.nn.moe import MoE, SharedExpert
from vlmoe.nn.router import Routing


class MHMoE(nn.Module):
    """MH-MoE (arXiv:2404.15045, section 3; arXiv:2411.16205, section 2).

    x -> split layers -> `num_heads` slices -> one router and one expert bank for all slices -> merge layers.
    `num_heads=1, num_split_layers=0, num_merge_layers=0` is `MoE`.

    Args:
        dim: width of a token, a multiple of `num_heads`.
        num_heads: sub-tokens per token.
        normalize_weights: None normalises when top_k > 1. Both papers and the official code never do, which makes the
            layer's output start about `num_experts` times smaller.
        num_split_layers, num_merge_layers: linear layers before the split and after the merge, 0 to 3, ReLU between.
        inner_residual: adds each sub-token to its experts' output (equation 6 of the first paper; neither the second
            paper nor the official code does).
        shared_dim: hidden width of a shared expert on whole tokens, added to the output (second paper, table 2).
        others: see `MoE`; they apply to sub-tokens, so the experts map dim / num_heads features.

    Raises:
        ValueError: a value is impossible; the text says what to change.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        num_heads: int,
        activation: str = "gelu",
        bias: bool = True,
        normalize_weights: bool | None = None,
        gate: str = "linear",
        capacity_factor: float | None = None,
        num_split_layers: int = 1,
        num_merge_layers: int = 1,
        inner_residual: bool = False,
        shared_dim: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; choose a divisor of dim ({dim})")
        for name, layers in (("num_split_layers", num_split_layers), ("num_merge_layers", num_merge_layers)):
            if not 0 <= layers <= 3:
                raise ValueError(f"{name} is {layers}; choose 0 to 3")
        self.num_heads = num_heads
        self.inner_residual = inner_residual
        self.split = _projection(dim, num_split_layers, gain=2**-0.5)
        self.moe = MoE(
            dim=dim // num_heads,
            hidden_dim=hidden_dim,
            num_experts=num_experts,
            top_k=top_k,
            activation=activation,
            bias=bias,
            normalize_weights=normalize_weights,
            gate=gate,
            capacity_factor=capacity_factor,
            backend=backend,
        )
        self.merge = _projection(dim, num_merge_layers, gain=1.0)
        for layer in self.merge.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)
        self.shared = None if shared_dim is None else SharedExpert(dim, shared_dim, activation=activation, bias=bias)

    def forward(
        self, x: Float[Tensor, "*batch dim"], is_padding: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch dim"], Routing]:
        """Layer output, and the routing of all sub-tokens (row t * num_heads + j is slice j of token t)."""
        sub_tokens = self.split(x).reshape(-1, x.shape[-1] // self.num_heads)
        if is_padding is not None:
            is_padding = is_padding.reshape(-1, 1).expand(-1, self.num_heads).reshape(-1)
        y, routing = self.moe(sub_tokens, is_padding)
        if self.inner_residual:
            y = y + sub_tokens
        y = self.merge(y.view(x.shape))
        return y if self.shared is None else y + self.shared(x), routing


def _projection(dim: int, num_layers: int, gain: float) -> nn.Module:
    """Square linear layers with ReLU between; no layer is the identity, one is a plain `nn.Linear`."""
    layers = [nn.Linear(dim, dim) for _ in range(num_layers)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, gain=gain)
    if num_layers < 2:
        return layers[0] if layers else nn.Identity()
    return nn.Sequential(layers[0], *(module for layer in layers[1:] for module in (nn.ReLU(), layer)))
