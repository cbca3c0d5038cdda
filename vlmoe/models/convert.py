"""Released BEiT-3 checkpoints <-> our modules, bit for bit.

The released models are the `decoupled` style with dense layers. Their key names say `A` (vision) and `B` (text) where
ours say `vision` and `text`; our `qkv` is their `q_proj`, `k_proj` and `v_proj`, one above the other.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmoe.config import FFNConfig, ModelConfig
from vlmoe.errors import UserError
from vlmoe.models.build import build_encoder
from vlmoe.models.encoder import Encoder
from vlmoe.models.heads import CaptioningModel, ClassificationModel, NLVR2Model, RetrievalModel, VQAModel
from vlmoe.nn.embed import UNUSED_ROWS, resize_positions
from vlmoe.nn.ffn import FeedForward

PREFIX = "beit3."
MODALITIES = {"vision": "A", "text": "B"}

TaskModel = VQAModel | NLVR2Model | RetrievalModel | CaptioningModel | ClassificationModel
# the model of a task, and the key whose rows are its one free size
TASK_MODELS: dict[str, tuple[type[TaskModel], str]] = {
    "vqa": (VQAModel, "head.3.weight"),
    "nlvr2": (NLVR2Model, "head.dense2.weight"),
    "retrieval": (RetrievalModel, "vision_head.weight"),
    "captioning": (CaptioningModel, "mlm_head.weight"),
    "classification": (ClassificationModel, "head.weight"),
}


def beit3_from_state_dict(
    state_dict: Mapping[str, Tensor], *, attn_heads: int, image_size: int | None = None, drop_path: float = 0.0
) -> Encoder:
    """The encoder of a released BEiT-3 checkpoint; every size and the dtype come from its tensors.

    Args:
        state_dict: tensors under the official names; keys that do not begin with "beit3." (heads) are not looked at.
        attn_heads: attention heads, which no tensor tells (base 12, large 16).
        image_size: pixels; another than the checkpoint's resizes the vision position table. None: the checkpoint's.
        drop_path: of the last layer, for fine-tuning.

    Raises:
        UserError: a key is missing, unknown, or of a shape or dtype that does not fit the others; the line names it.
    """
    state = {key: tensor for key, tensor in state_dict.items() if key.startswith(PREFIX)}
    patch_size = _size(state, "beit3.vision_embed.proj.weight", axis=3, dims=4)
    dim = _size(state, "beit3.text_embed.weight", axis=1, dims=2)
    if attn_heads < 1 or dim % attn_heads:
        raise UserError(f"attn_heads {attn_heads} does not divide the checkpoint's width {dim}")
    table = "beit3.encoder.embed_positions.A.weight"
    _size(state, table, axis=0, dims=2)
    if image_size is None:
        grid = math.isqrt(max(len(state[table]) - UNUSED_ROWS - 1, 0))
        image_size = grid * patch_size
    elif image_size < 1 or image_size % patch_size:
        raise UserError(f"image_size {image_size} is not a multiple of the checkpoint's patch size {patch_size}")
    try:
        state[table] = resize_positions(state[table], image_size // patch_size)
    except ValueError as error:
        raise UserError(f"{table}: {error}") from None
    final_norm = any(key.startswith("beit3.encoder.layer_norm.") for key in state)
    config = ModelConfig(
        dim=dim,
        depth=len({key.split(".")[3] for key in state if key.startswith("beit3.encoder.layers.")}),
        attn_heads=attn_heads,
        multiway="decoupled",
        image_size=image_size,
        patch_size=patch_size,
        max_text_length=_size(state, "beit3.encoder.embed_positions.B.weight", axis=0, dims=2) - UNUSED_ROWS,
        drop_path=drop_path,
        ffn=FFNConfig(kind="dense", dense_dim=_size(state, "beit3.encoder.layers.0.ffn.A.fc1.weight", axis=0, dims=2)),
    )
    vocab_size = _size(state, "beit3.text_embed.weight", axis=0, dims=2)
    with torch.device("meta"):
        encoder = build_encoder(config, vocab_size, final_norm=final_norm)

    layout = _layout(config.depth, final_norm)
    official = [key for keys in layout.values() for key in keys]
    dtype = _tensor(state, official[0]).dtype
    for key in official:
        if (own := _tensor(state, key).dtype) != dtype:
            raise UserError(f"checkpoint key {key} is {own}, but {official[0]} is {dtype}; convert all to one dtype")
    if unknown := sorted(state.keys() - set(official)):
        raise UserError(f"checkpoint key {unknown[0]} is not one of a BEiT-3 encoder of depth {config.depth}")
    for ours, parameter in encoder.named_parameters():
        rows, *rest = parameter.shape
        for key in layout[ours]:
            _check_shape(state, key, (rows // len(layout[ours]), *rest))
    ours_state = {ours: torch.cat([state[key] for key in keys]) for ours, keys in layout.items()}
    encoder.load_state_dict(ours_state, assign=True)
    return encoder


def beit3_to_state_dict(encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's tensors under the official names; `beit3_from_state_dict` reads them back.

    Raises:
        UserError: the encoder is not decoupled and dense with GELU, so the official layout has no place for it.
    """
    if odd := [
        each.activation for each in encoder.modules() if isinstance(each, FeedForward) and each.activation != "gelu"
    ]:
        raise UserError(f"only an encoder with GELU has a BEiT-3 checkpoint, and this one has {odd[0]}")
    ours_state = encoder.state_dict()
    layout = _layout(len(encoder.layers), encoder.norm is not None)
    if odd := sorted(ours_state.keys() ^ layout.keys()):
        raise UserError(f"only a decoupled, dense encoder has a BEiT-3 checkpoint; {odd[0]} does not fit into one")
    return {
        key: tensor.clone()
        for ours, keys in layout.items()
        for key, tensor in zip(keys, ours_state[ours].chunk(len(keys)), strict=True)
    }


def beit3_task_from_state_dict(
    task: str,
    state_dict: Mapping[str, Tensor],
    *,
    attn_heads: int,
    image_size: int | None = None,
    drop_path: float = 0.0,
) -> TaskModel:
    """A released fine-tuned model.

    Args:
        task: "vqa", "nlvr2", "retrieval", "captioning" or "classification".
        others: see `beit3_from_state_dict`; head keys of other tasks are not looked at.

    Raises:
        UserError: the task is unknown, or a key is missing or of the wrong shape; the line names it.
    """
    if task not in TASK_MODELS:
        raise UserError(f"task is {task!r}; choose one of {', '.join(TASK_MODELS)}")
    make, size_key = TASK_MODELS[task]
    size = _size(state_dict, size_key, axis=0, dims=2)
    encoder = beit3_from_state_dict(state_dict, attn_heads=attn_heads, image_size=image_size, drop_path=drop_path)
    model = make(encoder, size)
    heads = _head_parameters(model)
    for key, parameter in heads.items():
        _check_shape(state_dict, key, tuple(parameter.shape))
    model.load_state_dict({key: state_dict[key].clone() for key in heads}, strict=False, assign=True)
    return model


def beit3_task_to_state_dict(model: TaskModel) -> dict[str, Tensor]:
    """The model's tensors under the official names; `beit3_task_from_state_dict` reads them back."""
    heads = {key: parameter.detach().clone() for key, parameter in _head_parameters(model).items()}
    return beit3_to_state_dict(model.encoder) | heads


def _layout(depth: int, final_norm: bool) -> dict[str, tuple[str, ...]]:
    """Our parameter -> the official ones that it holds, stacked along its first axis."""
    layout: dict[str, tuple[str, ...]] = {
        "text_embed.tokens.weight": ("beit3.text_embed.weight",),
        "vision_embed.cls_token": ("beit3.vision_embed.cls_token",),
        "vision_embed.mask_token": ("beit3.vision_embed.mask_token",),
        "vision_embed.proj.weight": ("beit3.vision_embed.proj.weight",),
        "vision_embed.proj.bias": ("beit3.vision_embed.proj.bias",),
    }
    for modality, letter in MODALITIES.items():
        layout[f"{modality}_embed.positions"] = (f"beit3.encoder.embed_positions.{letter}.weight",)
        for kind in ("weight", "bias"):
            tail = f"{letter}.{kind}"
            if final_norm:
                layout[f"norm.{modality}.{kind}"] = (f"beit3.encoder.layer_norm.{tail}",)
            for index in range(depth):
                ours, theirs = f"layers.{index}", f"beit3.encoder.layers.{index}"
                attention = f"{theirs}.self_attn"
                qkv = tuple(f"{attention}.{name}_proj.{tail}" for name in "qkv")
                layout |= {
                    f"{ours}.attention.qkv.{modality}.norm.{kind}": (f"{theirs}.self_attn_layer_norm.{tail}",),
                    f"{ours}.attention.qkv.{modality}.linear.{kind}": qkv,
                    f"{ours}.attention.out.{modality}.norm.{kind}": (f"{attention}.inner_attn_ln.{tail}",),
                    f"{ours}.attention.out.{modality}.linear.{kind}": (f"{attention}.out_proj.{tail}",),
                    f"{ours}.ffn.norm.{modality}.{kind}": (f"{theirs}.final_layer_norm.{tail}",),
                    f"{ours}.ffn.ffn.{modality}.fc1.{kind}": (f"{theirs}.ffn.{letter}.fc1.{kind}",),
                    f"{ours}.ffn.ffn.{modality}.norm.{kind}": (f"{theirs}.ffn.{letter}.ffn_layernorm.{kind}",),
                    f"{ours}.ffn.ffn.{modality}.fc2.{kind}": (f"{theirs}.ffn.{letter}.fc2.{kind}",),
                }
    return layout


def _head_parameters(model: TaskModel) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if not name.startswith("encoder.")}


def _tensor(state: Mapping[str, Any], key: str) -> Tensor:
    if key not in state:
        raise UserError(f"checkpoint key {key} is missing")
    tensor = state[key]
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UserError(f"checkpoint key {key} is {kind}; a tensor of floating-point numbers is expected")
    return tensor


def _size(state: Mapping[str, Any], key: str, *, axis: int, dims: int) -> int:
    tensor = _tensor(state, key)
    if tensor.dim() != dims:
        raise UserError(f"checkpoint key {key} has shape {list(tensor.shape)}; {dims} axes are expected")
    return tensor.shape[axis]


def _check_shape(state: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> None:
    if tuple(_tensor(state, key).shape) != shape:
        raise UserError(f"checkpoint key {key} has shape {list(state[key].shape)}; {list(shape)} is expected")
