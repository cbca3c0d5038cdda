"""Sparse feed-forward layer on whole tokens.

Axes: `...` any leading axes, flattened to `rows` in order; `dim` of a token.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlmoe.nn.experts import ACTIVATIONS, Experts
from vlmoe.nn.router import Routing, TopKRouter


class SharedExpert(nn.Module):
    """The MLP that every token passes, beside the experts that the router chooses."""

    def __init__(self, dim: int, hidden_dim: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"shared_dim is {hidden_dim}; choose a positive width, or None for no shared expert")
        self.w_in = nn.Linear(dim, hidden_dim, bias=bias)
        self.w_gate = nn.Linear(dim, hidden_dim, bias=bias) if activation == "swiglu" else None
        self.w_out = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.w_in(x)) if self.w_gate is None else act(self.w_gate(x)) * self.w_in(x)
        return self.w_out(hidden)


class MoE(nn.Module):
    """SMoE: each token goes to `top_k` of `num_experts` MLPs. X-MoE is this with gate="xmoe".

    Args:
        dim: width of a token.
        hidden_dim: hidden width of an expert.
        num_experts, top_k, normalize_weights, gate, capacity_factor: see `TopKRouter`.
        activation: "gelu", "relu" or "swiglu".
        bias: in experts, the shared one included.
        shared_dim: hidden width of a shared expert whose output is added; None: no such expert.
        backend: see `experts`.

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
        activation: str = "gelu",
        bias: bool = True,
        normalize_weights: bool | None = None,
        gate: str = "linear",
        capacity_factor: float | None = None,
        shared_dim: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.router = TopKRouter(
            dim,
            num_experts,
            top_k,
            normalize_weights=normalize_weights,
            gate=gate,
            capacity_factor=capacity_factor,
        )
        self.experts = Experts(dim, hidden_dim, num_experts, activation=activation, bias=bias, backend=backend)
        self.shared = None if shared_dim is None else SharedExpert(dim, shared_dim, activation=activation, bias=bias)

    def forward(
        self, x: Float[Tensor, "*batch dim"], is_padding: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch dim"], Routing]:
        """Layer output and routing. Padding passes no routed expert and has no influence on other tokens."""
        rows = x.reshape(-1, x.shape[-1])
        routing, rows = self.router.route(rows, None if is_padding is None else is_padding.reshape(-1))
        expert_ids = routing.expert_ids
        if routing.kept is not None:
            expert_ids = torch.where(routing.kept, expert_ids, routing.num_experts)
        y = self.experts(rows, expert_ids, routing.weights).view(x.shape)
        return y if self.shared is None else y + self.shared(x), routing
