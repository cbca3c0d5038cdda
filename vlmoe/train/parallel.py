"""Data parallelism over the ranks that `torchrun` started; one process is the same code with world size 1."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmoe.errors import UserError


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join(device: str) -> Ranks:
    """Join the other ranks (`torchrun` sets RANK, WORLD_SIZE, LOCAL_RANK) and pick this one's device.

    Raises:
        UserError: device cuda where there is no CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError("device: cuda, but torch sees no CUDA device; use device=cpu, or install a CUDA build of torch")
    on_cuda = has_cuda if device == "auto" else device == "cuda"
    local = int(os.environ.get("LOCAL_RANK", 0))
    chosen = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, chosen)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), chosen)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_model(model: nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank."""
    if dist.is_initialized():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def sum_gradients(model: nn.Module) -> None:
    """Sum over ranks, in place, one all-reduce per dtype. A parameter that no rank's batch reached keeps no gradient, as on one
    rank: the optimiser leaves it alone."""
    if not dist.is_initialized():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reached = sum_over_ranks(torch.tensor([float(parameter.grad is not None) for parameter in trained])).tolist()
    for parameter, ranks in zip(trained, reached, strict=True):
        if ranks:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def sum_over_ranks(values: Tensor) -> Tensor:
    """On the device of `values`; the sum of a tensor in the processor's memory waits for no GPU."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank: what one rank decides, all do."""
    return bool(sum_over_ranks(torch.tensor(float(flag)))) if dist.is_initialized() else flag


def gather_lists(items: list[Any]) -> list[Any]:
    """Every rank's items, in rank order, on every rank."""
    if not dist.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
