"""Routing of a batch, laid out as the picture and the sentence are.

Axes: B samples, S positions of the packed sequence, h sub-tokens of a token (1 in a plain MoE), k = top_k.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vlmoe.models.encoder import EncoderOutput


@dataclass(frozen=True)
class PlacedRouting:
    """The experts that one expert bank chose for every position it saw."""

    name: str  # of the layer and bank, e.g. "layers.1.vision"
    num_experts: int
    expert_ids: Int[Tensor, "B S h k"]  # -1 where a slot is not kept (padding, over capacity)
    first_position: int  # position in the packed sequence of index 0 of axis S

    def patches(self, num_vision: int) -> Int[Tensor, "B P h k"]:
        """The patches alone: without the vision CLS token and without text."""
        return self.expert_ids[:, 1 : num_vision - self.first_position]


def place_routings(out: EncoderOutput, batch_size: int) -> list[PlacedRouting]:
    """Give the flat rows of each routing their positions back."""
    lengths = {modality: part.shape[1] for modality, part in out.parts.items()}
    placed = []
    for name, routing in out.routings.items():
        is_text = name.endswith(".text")
        positions = lengths.get(name.rsplit(".", 1)[1], sum(lengths.values()))
        ids = routing.expert_ids if routing.kept is None else torch.where(routing.kept, routing.expert_ids, -1)
        placed.append(
            PlacedRouting(
                name=name,
                num_experts=routing.num_experts,
                expert_ids=ids.view(batch_size, positions, -1, ids.shape[1]),
                first_position=out.num_vision if is_text else 0,
            )
        )
    return placed


def distinct_experts(expert_ids: Int[Tensor, "*positions h k"]) -> Int[Tensor, "*positions"]:
    """How many different experts the sub-tokens of one token reach together (paper 1, figures 7 and 8)."""
    ordered = expert_ids.flatten(-2).sort(-1).values
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return (is_new & (ordered >= 0)).sum(-1)
