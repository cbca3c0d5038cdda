"""Copies of a module per modality (BEiT-3's Multiway Transformer, arXiv:2208.10442, section 2.1).

A sequence goes through the layers in parts, one per modality: what passes a copy of its own is then one tensor, and nothing
is cut out of a whole and put back. Where all positions meet (attention, a bank that both share) parts are joined.

Axes: B samples, S positions of the packed sequence [vision CLS, patches | text], S_m those of a modality, d width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlmoe.nn.ffn import FeedForward
from vlmoe.nn.kernels import add_norm, residual_sum
from vlmoe.nn.router import Routing

Parts = dict[str, Float[Tensor, "B S_m _"]]  # "vision" first, "text" behind it; or one of them
PER_MODALITY = ("vision", "text")
SHARED = ("shared",)


class Stream(NamedTuple):
    """A sequence between two layers. The last layer's output is not yet added: the next norm does so on its way."""

    x: Parts  # the sum of all layers before
    y: Parts | None = None  # the last layer's output
    factor: Parts | None = None  # [B, 1, 1] or [1, N, 1] by modality: what it is multiplied by (drop path)

    def of(self, modality: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of one part."""
        y, factor = (None if each is None else each[modality] for each in (self.y, self.factor))
        return self.x[modality], y, factor

    def total(self) -> Parts:
        """The sum of all layers."""
        return {modality: residual_sum(*self.of(modality)) for modality in self.x}


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

    def choose(self, x: Parts) -> list[tuple[str, Parts]]:
        """Which copy takes which parts, in order."""
        if len(x) == 2 and "vl" in self.copies:
            return [("vl", x)]
        if "shared" in self.copies:
            return [("shared", x)]
        return [(modality, {modality: part}) for modality, part in x.items()]

    def forward(self, x: Parts) -> Parts:
        y: Parts = {}
        for name, parts in self.choose(x):
            y |= cut(self.get_submodule(name)(join(parts)), parts)
        return y

    def add_norm(self, stream: Stream) -> tuple[Parts, Parts]:
        """The sum of all layers, and what the copies, layer norms or `NormLinear`s, make of it."""
        total: Parts = {}
        y: Parts = {}
        for name, parts in self.choose(stream.x):
            copy = self.get_submodule(name)
            norm = copy.norm if isinstance(copy, NormLinear) else copy
            assert isinstance(norm, nn.LayerNorm)
            if len(parts) > 1:
                total |= stream.total()
                _, normed = add_norm(join(total), None, norm)
            else:
                (modality,) = parts
                x, added, factor = stream.of(modality)
                total[modality], normed = add_norm(x, added, norm, factor)
            y |= cut(copy.linear(normed) if isinstance(copy, NormLinear) else normed, parts)
        return total, y


def join(parts: Parts) -> Float[Tensor, "B S _"]:
    """The packed sequence."""
    return next(iter(parts.values())) if len(parts) == 1 else torch.cat(list(parts.values()), dim=1)


def cut(x: Float[Tensor, "B S _"], like: Parts) -> Parts:
    """A packed sequence in parts as long as those of `like`."""
    if len(like) == 1:
        return dict.fromkeys(like, x)
    return dict(zip(like, x.split([part.shape[1] for part in like.values()], dim=1), strict=True))


class NormLinear(nn.Module):
    """linear(norm(x)): both halves of Magneto's attention begin with a layer norm of their own."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-5)
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch out_dim"]:
        return self.linear(add_norm(x, None, self.norm)[1])


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
        self, stream: Stream, is_padding: Bool[Tensor, "B S"] | None
    ) -> tuple[Parts, Parts, dict[str, Routing]]:
        """Returns the residual stream's sum, the output that is to be added to it, and the routing of each copy that was used,
        by its name. `is_padding` is that of the packed sequence; vision has none."""
        x, normed = self.norm.add_norm(stream)
        y: Parts = {}
        routings: dict[str, Routing] = {}
        for name, parts in self.ffn.choose(normed):
            ffn, rows = self.ffn.get_submodule(name), join(parts)
            if isinstance(ffn, FeedForward):
                out = ffn(rows)
            else:
                hidden = None if is_padding is None or name == "vision" else is_padding[:, -rows.shape[1] :]
                out, routings[name] = ffn(rows, hidden)
            y |= cut(out, parts)
        return x, y, routings
