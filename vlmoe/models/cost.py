"""What a model costs, beside its dense twin: so that nobody compares unequal things by accident.

FLOPs are those of one token's forward pass through the blocks (weight products; attention scores, embeddings and heads are
left out), in the papers' convention of `vlmoe.nn.budget`.
"""

from dataclasses import replace

import torch

from vlmoe.config import FFNConfig, ModelConfig
from vlmoe.models.build import build_encoder, expert_dim, sparse_layers
from vlmoe.models.heads import PretrainModel
from vlmoe.nn.budget import Cost, dense_cost, mhmoe_cost, moe_cost


def ffn_cost(ffn: FFNConfig, dim: int) -> Cost:
    """Of one sparse layer's feed-forward part (one expert bank)."""
    hidden = expert_dim(ffn, dim)
    if ffn.kind == "moe":
        return moe_cost(
            dim, hidden, ffn.num_experts, ffn.top_k,
            activation=ffn.activation, bias=ffn.bias, gate=ffn.gate, shared_dim=ffn.shared_dim,
        )  # fmt: skip
    return mhmoe_cost(
        dim, hidden, ffn.num_experts, ffn.top_k, ffn.num_heads,
        activation=ffn.activation, bias=ffn.bias, gate=ffn.gate, shared_dim=ffn.shared_dim,
        num_split_layers=ffn.num_split_layers, num_merge_layers=ffn.num_merge_layers,
    )  # fmt: skip


def flops_per_token(config: ModelConfig) -> int:
    sparse = len(sparse_layers(config))
    dense = dense_cost(config.dim, config.ffn.dense_dim or 4 * config.dim, activation=config.ffn.activation).flops
    attention = 8 * config.dim**2
    return config.depth * attention + (config.depth - sparse) * dense + sparse * (
        ffn_cost(config.ffn, config.dim).flops if sparse else 0
    )  # fmt: skip


def count_parameters(config: ModelConfig, vocab_size: int, num_codes: int) -> tuple[int, int]:
    """(all, active): active leaves out, of every expert bank, the experts that one token cannot reach."""
    with torch.device("meta"):
        model = PretrainModel(build_encoder(config, vocab_size), vocab_size, num_codes)
    total = sum(each.numel() for each in model.parameters())
    if not sparse_layers(config):
        return total, total
    cost = ffn_cost(config.ffn, config.dim)
    banks = sum(1 for name, _ in model.named_parameters() if name.endswith("experts.w_in"))
    return total, total - banks * (cost.params - cost.active_params)


def describe_model(config: ModelConfig, vocab_size: int, num_codes: int) -> str:
    """A small table: this model, and the same with dense layers everywhere."""
    ffn, twin = config.ffn, replace(config, ffn=replace(config.ffn, kind="dense"))
    sparse = sparse_layers(config)
    kind = f"{ffn.kind} ({ffn.gate} gate)" if sparse else "dense"
    heads = f"{ffn.num_heads} x {config.dim // ffn.num_heads} features" if ffn.kind == "mhmoe" else "whole tokens"
    hidden = expert_dim(ffn, config.dim) if sparse else 0
    lines = [
        f"model: {config.depth} layers of width {config.dim}, {config.multiway}, {kind}"
        + (
            f" in layers {', '.join(map(str, sparse))}: {ffn.num_experts} experts of width {hidden} "
            f"{'per modality' if ffn.experts_per_modality else 'for both modalities'}, top {ffn.top_k}, {heads}"
            if sparse
            else ""
        ),
        f"{'':<12}{'parameters':>14}{'active':>14}{'MFLOPs/token':>14}",
    ]
    for name, each in {"this model": config, "dense twin": twin}.items():
        total, active = count_parameters(each, vocab_size, num_codes)
        lines.append(f"{name:<12}{total / 1e6:>12.2f} M{active / 1e6:>12.2f} M{flops_per_token(each) / 1e6:>14.3f}")
    return "\n".join(lines)
