"""Which experts a row goes to, and the losses that keep the choice even.

Axes: `rows` (tokens, or sub-tokens in MH-MoE), `dim` of a row, `experts`, `top_k` chosen ones.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmoe.nn.dispatch import order_slots
from vlmoe.nn.kernels import chooses_in_one_kernel, count_slots, gate_top_k, top_k_softmax, widened


@dataclass(frozen=True)
class Routing:
    """Where each row goes: what the losses, the metrics and the pictures are made of."""

    logits: Float[Tensor, "rows experts"]  # float32; float64 for a float64 input
    weights: Float[Tensor, "rows top_k"]  # combine weights, best expert first; 0 where a slot is not kept
    expert_ids: Int[Tensor, "rows top_k"]  # always a valid expert
    kept: Bool[Tensor, "rows top_k"] | None  # False: padding, or over capacity; None: every slot is kept
    is_padding: Bool[Tensor, " rows"] | None

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    @property
    def probs(self) -> Float[Tensor, "rows experts"]:
        return self.logits.softmax(-1)

    @property
    def load(self) -> Int[Tensor, " experts"]:
        """Kept slots per expert."""
        return _count(self.expert_ids, self.num_experts, self.kept)

    @property
    def importance(self) -> Float[Tensor, " experts"]:
        """Mean router probability per expert, over real rows."""
        return _mean_over_real_rows(self.probs, self.is_padding)


def load_balancing_loss(routing: Routing) -> Float[Tensor, ""]:
    """Switch Transformer's (arXiv:2101.03961, eq. 4) for any top_k: 1 when even, up to `experts` / `top_k` when not.

    Every choice counts, also one that capacity dropped; padding does not. The gradient reaches the probabilities only.
    """
    is_real = None if routing.is_padding is None else ~routing.is_padding[:, None].expand_as(routing.expert_ids)
    chosen = _count(routing.expert_ids, routing.num_experts, is_real)
    share = chosen.to(routing.logits.dtype) / chosen.sum().clamp(min=1)
    return routing.num_experts * (share * routing.importance).sum()


def router_z_loss(routing: Routing) -> Float[Tensor, ""]:
    """ST-MoE's (arXiv:2202.08906, eq. 5): mean squared log-sum-exp of a real row's logits."""
    return _mean_over_real_rows(routing.logits.logsumexp(-1).square(), routing.is_padding)


class LinearGate(nn.Module):
    """logits = W x, the gate of both papers' released recipe."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_experts, dim), std=0.02))

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows experts"]:
        x = widened(x)
        return F.linear(x, self.weight.to(x.dtype))


class XMoEGate(nn.Module):
    """X-MoE's (arXiv:2204.09179, section 3): cosine of projected row and expert embedding, over a temperature.

    The embeddings have `num_experts // 2` features, as in that paper, and two at least. The temperature is learned through
    its logarithm, so that it stays positive, and starts at 0.3, the paper's value for a softmax gate.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        gate_dim = max(2, num_experts // 2)  # one feature alone would only know plus and minus
        self.projection = nn.Parameter(nn.init.trunc_normal_(torch.empty(gate_dim, dim), std=0.02))
        self.embeddings = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, gate_dim)))
        self.log_temperature = nn.Parameter(torch.tensor([0.3]).log())

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows experts"]:
        x = widened(x)
        projected = F.normalize(F.linear(x, self.projection.to(x.dtype)), dim=-1, eps=1e-6)
        cosine = F.linear(projected, F.normalize(self.embeddings.to(x.dtype), dim=-1))
        return cosine / self.log_temperature.to(x.dtype).exp()


class TorchscaleGate(nn.Module):
    """What torchscale and the official MH-MoE code compute under the name X-MoE: logits = (W x) . e / |e|.

    W projects to 16 features; the projected row is not normalised and there is no temperature. That code rescales the
    embeddings e to norm 1.5 in place before each use; here they are rescaled on the fly, with that code's gradient.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(16, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.embeddings = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, 16), gain=0.32))

    def forward(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows experts"]:
        x = widened(x)
        embeddings = self.embeddings.to(x.dtype)
        rescaled = embeddings + (1.5 * F.normalize(embeddings, dim=-1) - embeddings).detach()
        return F.linear(F.linear(x, self.projection.to(x.dtype)), F.normalize(rescaled, dim=-1))


GATES: dict[str, type[LinearGate | XMoEGate | TorchscaleGate]] = {
    "linear": LinearGate,
    "xmoe": XMoEGate,
    "torchscale": TorchscaleGate,
}


class TopKRouter(nn.Module):
    """Softmax over all experts, then the `top_k` most probable ones.

    Args:
        dim: width of a row.
        num_experts: experts to choose from.
        top_k: experts per row.
        normalize_weights: chosen probabilities are divided by their sum; None: when top_k > 1.
        gate: the map to logits, a key of `GATES`.
        capacity_factor: an expert takes at most `top_k * ceil(capacity_factor * real rows / experts)` slots: all rows'
            first choices in row order, then all second choices, and so on. None: dropless.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        normalize_weights: bool | None = None,
        gate: str = "linear",
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; choose 1 to num_experts ({num_experts})")
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}; choose one of {', '.join(GATES)}")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor is {capacity_factor}; choose a positive number, or None to drop nothing")
        self.gate = GATES[gate](dim, num_experts)
        self.top_k = top_k
        self.normalize_weights = top_k > 1 if normalize_weights is None else normalize_weights
        self.capacity_factor = capacity_factor

    def forward(self, x: Float[Tensor, "rows dim"], is_padding: Bool[Tensor, " rows"] | None = None) -> Routing:
        return self.route(x, is_padding)[0]

    def route(
        self, x: Float[Tensor, "rows dim"], is_padding: Bool[Tensor, " rows"] | None = None
    ) -> tuple[Routing, Float[Tensor, "rows dim"]]:
        """The routing, and x for the experts: on a GPU their gradient of it and the gate's are then one tensor's."""
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(self.gate, LinearGate) and chooses_in_one_kernel(x, self.gate.weight):
                logits, weights, expert_ids, x = gate_top_k(x, self.gate.weight, self.top_k)
            else:
                logits = self.gate(x)
                weights, expert_ids = top_k_softmax(logits, self.top_k)
            if self.normalize_weights:
                weights = weights / weights.sum(-1, keepdim=True)
        kept = None if is_padding is None else ~is_padding[:, None].expand_as(expert_ids)
        if self.capacity_factor is not None:
            kept = _within_capacity(expert_ids, logits.shape[1], self.capacity_factor, kept)
        if kept is not None:
            weights = torch.where(kept, weights, 0)
        return Routing(logits, weights, expert_ids, kept, is_padding), x


def _within_capacity(expert_ids: Tensor, num_experts: int, capacity_factor: float, is_real: Tensor | None) -> Tensor:
    """[rows, top_k], True for slots that find room at their expert: k-th choices queue behind all (k-1)-th ones."""
    rows, top_k = expert_ids.shape
    if is_real is None:
        is_real = torch.ones_like(expert_ids, dtype=torch.bool)
    real_rows = is_real[:, 0].sum()
    capacity = top_k * (real_rows.double() * capacity_factor / num_experts).ceil().clamp(max=rows).long()
    queue = torch.where(is_real, expert_ids, num_experts).t().reshape(-1, 1)
    order = order_slots(queue, num_experts)
    starts = F.pad(order.ends, (1, 0))  # the last one is that of the tail
    position = order.places - starts[queue]
    return (position < capacity).view(top_k, rows).t().contiguous() & is_real


def _count(expert_ids: Tensor, num_experts: int, counted: Tensor | None) -> Tensor:
    return count_slots(expert_ids if counted is None else torch.where(counted, expert_ids, num_experts), num_experts)


def _mean_over_real_rows(values: Tensor, is_padding: Tensor | None) -> Tensor:
    if is_padding is None:
        return values.sum(0) / max(len(values), 1)
    is_real = ~is_padding
    masked = torch.where(is_real.view(-1, *[1] * (values.dim() - 1)), values, 0)
    return masked.sum(0) / is_real.sum().clamp(min=1)
