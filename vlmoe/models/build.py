"""From a recipe's `model` block to an encoder, and what an optimiser should know of its parameters."""

import math
import re
from functools import partial

import torch
from torch import Tensor, nn

from vlmoe.config import FFNConfig, ModelConfig
from vlmoe.errors import UserError
from vlmoe.models.encoder import Block, Encoder
from vlmoe.models.heads import SummedCrossEntropy
from vlmoe.nn.attention import Attention
from vlmoe.nn.budget import dense_cost, flops_parity_hidden_dim
from vlmoe.nn.embed import ConvStem, TextEmbed, VisionEmbed
from vlmoe.nn.experts import Experts, fastest_backend
from vlmoe.nn.ffn import FeedForward
from vlmoe.nn.kernels import slower_kernels, triton_problem
from vlmoe.nn.mhmoe import MHMoE
from vlmoe.nn.moe import MoE
from vlmoe.nn.multiway import PER_MODALITY, SHARED, Multiway, MultiwayFFN, NormLinear

RECOMPILE_LIMIT = 64


def build_encoder(config: ModelConfig, vocab_size: int, *, final_norm: bool = True) -> Encoder:
    """The encoder that a recipe describes, freshly initialised.

    Args:
        config: the recipe's `model` block.
        vocab_size: rows of the token table.
        final_norm: False leaves out the norm after the last layer (released VQA and ImageNet models).

    Raises:
        UserError: sizes that do not fit together; the line names the recipe's keys.
    """
    check_model(config)
    attention_copies = PER_MODALITY if config.multiway == "decoupled" else SHARED
    try:
        layers = [
            Block(
                Attention(config.dim, config.attn_heads, copies=attention_copies),
                _make_ffn(config, layer),
            )
            for layer in range(config.depth)
        ]
        encoder = Encoder(
            vision_embed=VisionEmbed(
                image_size=config.image_size, patch_size=config.patch_size, dim=config.dim, stem=config.stem
            ),
            text_embed=TextEmbed(vocab_size=vocab_size, max_length=config.max_text_length, dim=config.dim),
            layers=layers,
            norm=Multiway(lambda: nn.LayerNorm(config.dim, eps=1e-5), copies=attention_copies) if final_norm else None,
            drop_path=config.drop_path,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    init_weights(encoder)
    return encoder


def sparse_layers(config: ModelConfig) -> list[int]:
    """Layers, counted from 0, whose feed-forward part is a mixture of experts."""
    ffn = config.ffn
    if ffn.kind == "dense":
        return []
    if ffn.moe_layers is not None:
        return sorted(set(ffn.moe_layers))
    return [layer for layer in range(config.depth) if ffn.moe_every and (layer + 1) % ffn.moe_every == 0]


def check_model(config: ModelConfig) -> None:
    """Sizes that no single key can tell to be wrong. Raises UserError."""
    ffn = config.ffn
    for key in ("dim", "depth", "attn_heads", "image_size", "patch_size", "max_text_length"):
        if getattr(config, key) < 1:
            raise UserError(f"model.{key} is {getattr(config, key)}; it must be at least 1")
    if config.image_size % config.patch_size:
        raise UserError(
            f"model.image_size {config.image_size} is not a multiple of model.patch_size {config.patch_size}"
        )
    if config.dim % config.attn_heads:
        raise UserError(f"model.dim {config.dim} is not divisible by model.attn_heads {config.attn_heads}")
    if config.vl_layers and config.multiway == "decoupled":
        raise UserError("model.vl_layers needs model.multiway=shared_attention; set it to 0 for decoupled")
    if not 0 <= config.vl_layers <= config.depth:
        raise UserError(f"model.vl_layers {config.vl_layers} is not between 0 and model.depth {config.depth}")
    if ffn.kind == "dense":
        return
    for key in ("num_experts", "num_heads", "hidden_dim", "dense_dim"):
        if (value := getattr(ffn, key)) is not None and value < 1:
            raise UserError(f"model.ffn.{key} is {value}; it must be at least 1")
    if ffn.moe_every < 0:
        raise UserError(f"model.ffn.moe_every is {ffn.moe_every}; choose 0 (none) or more")
    outside = [layer for layer in ffn.moe_layers or () if not 0 <= layer < config.depth]
    if outside:
        raise UserError(f"model.ffn.moe_layers has {outside[0]}; layers of model.depth {config.depth} count from 0")
    if not 1 <= ffn.top_k <= ffn.num_experts:
        raise UserError(f"model.ffn.top_k {ffn.top_k} is not between 1 and model.ffn.num_experts {ffn.num_experts}")
    num_heads = ffn.num_heads if ffn.kind == "mhmoe" else 1
    if config.dim % num_heads:
        raise UserError(f"model.dim {config.dim} is not divisible by model.ffn.num_heads {num_heads}")
    if ffn.backend == "grouped":
        widths = {
            "model.dim / model.ffn.num_heads": config.dim // num_heads,
            "model.ffn.hidden_dim": ffn.hidden_dim or 0,
        }
        for name, width in widths.items():
            if width % 8:
                raise UserError(f"{name} is {width}; model.ffn.backend=grouped needs a multiple of 8")


def check_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where the experts' backend cannot run on this device, in this dtype."""
    if config.ffn.backend != "triton" or not sparse_layers(config):
        return
    if problem := triton_problem(_no_rows(config, device, dtype), expert_dim(config.ffn, config.dim)):
        raise UserError(f"model.ffn: {problem}")


def experts_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> str:
    """What the experts run on, "auto" decided; empty for a dense model."""
    ffn = config.ffn
    if not sparse_layers(config):
        return ""
    if ffn.backend != "auto":
        return ffn.backend
    rows, hidden_dim = _no_rows(config, device, dtype), expert_dim(ffn, config.dim)
    return fastest_backend(rows, hidden_dim, ffn.activation, compiled=compiled)


def describe_experts(config: ModelConfig, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> str:
    """The same, and what slows it down here."""
    backend = experts_backend(config, device, dtype, compiled=compiled)
    if backend != "triton":
        return backend
    slower = slower_kernels(_no_rows(config, device, dtype), expert_dim(config.ffn, config.dim), config.ffn.activation)
    return f"{backend} ({slower})" if slower else backend


def _no_rows(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    width = config.dim // (config.ffn.num_heads if config.ffn.kind == "mhmoe" else 1)
    return torch.empty(0, width, dtype=dtype, device=device)


def init_weights(encoder: Encoder) -> None:
    """Truncated normal of std 0.02 at width 768, as in BEiT-3, and sqrt(log(2 * depth)) times that for the value and
    output projections and both matrices of a feed-forward layer (Magneto, arXiv:2210.06423, figure 2, encoder-only
    models). At another width std goes with dim ** -0.5, so that outputs start equally large: at 0.02 narrow models
    hardly learn for hundreds of steps.

    Sparse layers keep what their modules draw (std by fan-in, for an expert is narrower than a layer; router, split and
    merge as in their papers), with the same factor on the experts' matrices. So does a stem of convolutions.
    """
    gain = math.sqrt(math.log(2 * len(encoder.layers)))
    init_plain = partial(_init_plain, std=0.02 * math.sqrt(768 / encoder.dim))
    for module in (encoder.vision_embed, encoder.text_embed):
        module.apply(init_plain)
    if isinstance(encoder.vision_embed.proj, ConvStem):
        encoder.vision_embed.proj.reset_parameters()
    for block in encoder.layers:
        assert isinstance(block, Block)
        block.attention.apply(init_plain)
        for part, first_row in ((block.attention.qkv, 2 * encoder.dim), (block.attention.out, 0)):
            for copy in part.modules():
                if isinstance(copy, NormLinear):
                    _scale(copy.linear.weight[first_row:], gain)
        for copy in block.ffn.ffn.children():
            if isinstance(copy, FeedForward):
                copy.apply(init_plain)
                for linear in (copy.fc1, copy.fc2):
                    _scale(linear.weight, gain)
            for experts in copy.modules():
                if isinstance(experts, Experts):
                    _scale(experts.w_in, gain)
                    _scale(experts.w_out, gain)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block, a stem of convolutions and the loss over classes, in place; parameters keep their names.

    Block by block, for equal ones of all layers are compiled once. Streams differ in what they pass (image, text, both) and
    text in length, so blocks need more variants than torch allows by itself before it gives up compiling. Two steps of
    Inductor are not made for shapes that vary and are off: the analysis of tiles stops at some with an AssertionError
    (pytorch/pytorch#181563), and sums over rows that share a kernel with sums over columns slice their workspace by a length
    without its parentheses (both seen with torch 2.11).
    """
    import torch._inductor.config

    torch._inductor.config.triton.coalesce_tiling_analysis = False
    if hasattr(torch._inductor.config.triton, "mix_order_reduction"):
        torch._inductor.config.triton.mix_order_reduction = False
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, (Block, ConvStem, SummedCrossEntropy)):
            module.compile()


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter of an encoder, or of a model that holds one as `encoder`, for layer-wise decay.

    Embeddings are 0, block i is i + 1, and everything else (final norm, heads) is the last: depth + 1. A model of
    another kind is one layer.
    """
    encoder = model if isinstance(model, Encoder) else getattr(model, "encoder", None)
    prefix = "" if encoder is model else r"encoder\."
    last = len(encoder.layers) + 1 if isinstance(encoder, Encoder) else 0
    ids = {}
    for name, _ in model.named_parameters():
        place = re.match(rf"{prefix}(?:(\w+_embed)|layers\.(\d+))\.", name) if last else None
        ids[name] = last if place is None else 0 if place[1] else int(place[2]) + 1
    return ids


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of parameters that weight decay should leave alone.

    They are vectors and scalars, biases (also those of expert banks), position tables, and the CLS and mask tokens.
    """
    spared = {"bias", "b_in", "b_out", "b_gate", "positions", "decoder_positions", "cls_token", "mask_token"}
    return {name for name, p in model.named_parameters() if p.dim() < 2 or name.rpartition(".")[2] in spared}


def _make_ffn(config: ModelConfig, layer: int) -> MultiwayFFN:
    ffn, joint = config.ffn, ("vl",) if layer >= config.depth - config.vl_layers else ()
    is_sparse = layer in sparse_layers(config)
    per_modality = ffn.experts_per_modality or not is_sparse
    dense_dim = ffn.dense_dim or 4 * config.dim

    def make() -> nn.Module:
        if not is_sparse:
            return FeedForward(config.dim, dense_dim, activation=ffn.activation)
        return _make_moe(ffn, config.dim)

    copies = (*(PER_MODALITY if per_modality else SHARED), *joint)
    return MultiwayFFN(config.dim, make, norm_copies=(*PER_MODALITY, *joint), copies=copies)


def _make_moe(ffn: FFNConfig, dim: int) -> MoE | MHMoE:
    hidden_dim = expert_dim(ffn, dim)
    make = MoE
    if ffn.kind == "mhmoe":
        make = partial(
            MHMoE,
            num_heads=ffn.num_heads,
            num_split_layers=ffn.num_split_layers,
            num_merge_layers=ffn.num_merge_layers,
            inner_residual=ffn.inner_residual,
        )
    return make(
        dim=dim,
        hidden_dim=hidden_dim,
        num_experts=ffn.num_experts,
        top_k=ffn.top_k,
        activation=ffn.activation,
        bias=ffn.bias,
        normalize_weights=ffn.normalize_weights,
        gate=ffn.gate,
        capacity_factor=ffn.capacity_factor,
        shared_dim=ffn.shared_dim,
        backend=ffn.backend,
    )


def expert_dim(ffn: FFNConfig, dim: int) -> int:
    """Hidden width of an expert: the recipe's, or that which gives a sparse layer the FLOPs of a dense one, as a multiple
    of 8."""
    if ffn.hidden_dim:
        return ffn.hidden_dim
    is_split = ffn.kind == "mhmoe"
    try:
        return flops_parity_hidden_dim(
            dense_cost(dim, ffn.dense_dim or 4 * dim, activation=ffn.activation),
            dim=dim,
            top_k=ffn.top_k,
            activation=ffn.activation,
            num_split_layers=ffn.num_split_layers if is_split else 0,
            num_merge_layers=ffn.num_merge_layers if is_split else 0,
            shared_dim=ffn.shared_dim,
        )
    except ValueError as error:
        raise UserError(f"model.ffn.hidden_dim: no width matches the dense layer, for {error}") from None


def _init_plain(module: nn.Module, std: float) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def _scale(weight: torch.Tensor, factor: float) -> None:
    weight.mul_(factor)
