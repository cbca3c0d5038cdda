"""Copies of a module per modality (BEiT-3's Multiway Transformer, arXiv:2208.10442, section 2.1).

Axes: B samples, S positions of the packed sequence [vision CLS, patches | text], of which the first `num_vision` are
vision, d width.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlmoe.nn.ffn import FeedForward
from vlmoe.nn.router import Routing

PER_MODALITY = ("vision", "text")
SHARED = ("shared",)


class Multiway(nn.Module):
    """A module in several copies; each position of the sequence passes one of them.

    Args:
        make: makes a copy.
        copies: names of the copies. A pair (image and text together) passes "vl" whole where there is one; else every
            position passes "shared" where there is one; else vision positions pass "vision" and text positions "text".
    """

    def __init__(self, make: Callable[[], nn.Module], *, copies: Sequence[str]) -> None:
        super().__init__()
        self.copies = tuple(copies)
        for name in copies:
            self.add_module(name, make())

    def segments(self, num_vision: int, length: int) -> list[tuple[str, slice]]:
        """Which copy takes which positions of a sequence, in order."""
        is_pair = 0 < num_vision < length
        if is_pair and "vl" in self.copies:
            return [("vl", slice(None))]
        if "shared" in self.copies:
            return [("shared", slice(None))]
        if is_pair:
            return [("vision", slice(0, num_vision)), ("text", slice(num_vision, None))]
        return [("vision" if num_vision else "text", slice(None))]

    def forward(self, x: Float[Tensor, "B S _"], num_vision: int) -> Float[Tensor, "B S _"]:
        parts = [self.get_submodule(name)(x[:, positions]) for name, positions in self.segments(num_vision, x.shape[1])]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class NormLinear(nn.Module):
    """linear(norm(x)): both halves of Magneto's attention begin with a layer norm of their own."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-5)
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        return self.linear(self.norm(x))


class MultiwayFFN(nn.Module):
    """Layer norm and feed-forward part of a block; says where its sparse layers sent the rows.

    Args:
        dim: d.
        make: makes a FeedForward, a MoE or an MHMoE.
        norm_copies: copies of the layer norm, as in `Multiway`.
        copies: copies of the feed-forward layer. "shared" is one expert bank over the packed sequence.
    """

    def __init__(
        self, dim: int, make: Callable[[], nn.Module], *, norm_copies: Sequence[str], copies: Sequence[str]
    ) -> None:
        super().__init__()
        self.norm = Multiway(lambda: nn.LayerNorm(dim, eps=1e-5), copies=norm_copies)
        self.ffn = Multiway(make, copies=copies)

    def forward(
        self, x: Float[Tensor, "B S d"], num_vision: int, is_padding: Bool[Tensor, "B S"] | None
    ) -> tuple[Float[Tensor, "B S d"], dict[str, Routing]]:
        """Returns the output (without the residual) and the routing of each copy that was used, by its name."""
        x = self.norm(x, num_vision)
        parts: list[Tensor] = []
        routings: dict[str, Routing] = {}
        for name, positions in self.ffn.segments(num_vision, x.shape[1]):
            ffn = self.ffn.get_submodule(name)
            if isinstance(ffn, FeedForward):
                parts.append(ffn(x[:, positions]))
                continue
            hidden = None if is_padding is None or name == "vision" else is_padding[:, positions]
            y, routings[name] = ffn(x[:, positions], hidden)
            parts.append(y)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), routings
