"""AdamW with layer-wise learning rates, and its schedule as a pure function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe.config import OptimConfig
from vlmoe.models import Encoder, layer_ids, no_weight_decay


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """One parameter group per (layer, decayed or not, head or not).

    `lr_scale` of a group is layer_decay ** (layers above it), times head_lr_scale for what is beside the encoder. Layer
    numbers are BEiT's: embeddings 0, Transformer layer i is i + 1, heads and final norm last (unilm beit3,
    optim_factory.py).
    """
    ids, undecayed = layer_ids(model), no_weight_decay(model)
    last, has_encoder = max(ids.values()), isinstance(getattr(model, "encoder", None), Encoder)
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = name not in undecayed
        is_head = has_encoder and not name.startswith("encoder.")
        group = groups.setdefault(
            (ids[name], decays, is_head),
            {
                "params": [],
                "names": [],
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_scale": config.layer_decay ** (last - ids[name]) * (config.head_lr_scale if is_head else 1.0),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up from 0, then cosine to `min_lr`. `step` counts from 0: the first update uses step 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # of `GraphedUpdate`
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
