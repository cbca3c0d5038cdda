"""The dense feed-forward layer.  Axes: d width, f hidden width."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlmoe.nn.kernels import linear_gelu_norm

Activation = Literal["gelu", "relu", "swiglu"]


class FeedForward(nn.Module):
    """fc2(norm(act(fc1 x))), after Magneto (arXiv:2210.06423): its second layer norm stands before `fc2`.

    Args:
        dim: d, of input and output.
        hidden_dim: f.
        activation: exact (erf) GELU (on GPUs in 16 bits within 3e-4 of it), ReLU, or SwiGLU, where silu(fc_gate x)
            multiplies fc1 x.
        sub_layernorm: False leaves the inner norm out.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: Activation = "gelu", sub_layernorm: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc_gate = nn.Linear(dim, hidden_dim) if activation == "swiglu" else None
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-5) if sub_layernorm else nn.Identity()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if self.activation == "gelu" and isinstance(self.norm, nn.LayerNorm):
            return self.fc2(linear_gelu_norm(x, self.fc1, self.norm))
        hidden = self.fc1(x)
        if self.fc_gate is not None:
            hidden = F.silu(self.fc_gate(x)) * hidden
        else:
            hidden = F.gelu(hidden) if self.activation == "gelu" else F.relu(hidden)
        return self.fc2(self.norm(hidden))
