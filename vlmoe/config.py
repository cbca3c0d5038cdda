"""What a recipe may say: one dataclass per block of its YAML, and how the file becomes one.

Imports no torch, so that `vlmoe config RECIPE` answers at once.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmoe.errors import UserError
from vlmoe.recipe_checks import check_keys, check_ranges


@dataclass(kw_only=True)
class FFNConfig:
    """The feed-forward layers. `kind` says what stands in the layers that `moe_every` or `moe_layers` choose."""

    kind: Literal["dense", "moe", "mhmoe"] = "mhmoe"
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    dense_dim: int | None = None  # hidden width of a dense layer; None: 4 * dim
    moe_every: int = 2  # layers n, 2n, ... (counted from 1) are sparse; 0: none
    moe_layers: list[int] | None = None  # or exactly these, counted from 0
    experts_per_modality: bool = True  # vision and text each own an expert bank; False: one bank for both
    num_experts: int = 16
    top_k: int = 2
    hidden_dim: int | None = None  # hidden width of an expert; None: as many FLOPs as the dense layer
    num_heads: int = 2  # sub-tokens per token (mhmoe); 1 leaves tokens whole
    normalize_weights: bool | None = None  # chosen weights sum to one; None: when top_k > 1
    gate: Literal["linear", "xmoe", "torchscale"] = "linear"
    bias: bool = True  # in experts
    num_split_layers: int = 1  # 0..3 linear layers before the split, ReLU between
    num_merge_layers: int = 1  # 0..3 linear layers after the merge, ReLU between
    inner_residual: bool = False  # paper 1, equation 6
    shared_dim: int | None = None  # hidden width of a shared expert that every token passes; None: no such expert
    capacity_factor: float | None = None  # slots an expert takes, relative to an even load; None: dropless
    backend: Literal["auto", "loop", "batched", "grouped", "triton"] = "auto"  # see vlmoe.nn.experts


@dataclass(kw_only=True)
class ModelConfig:
    """The multiway encoder (BEiT-3)."""

    dim: int = 192
    depth: int = 4
    attn_heads: int = 3
    multiway: Literal["decoupled", "shared_attention"] = "decoupled"
    vl_layers: int = 0  # top layers where pairs pass a joint VL feed-forward layer (shared_attention only)
    image_size: int = 64  # pixels
    patch_size: int = 8  # pixels
    stem: Literal["linear", "conv"] = "linear"  # from pixels to patches: as in BEiT-3, or overlapping convolutions
    max_text_length: int = 64  # tokens, <s> and </s> included
    drop_path: float = 0.0  # of the last layer; grows linearly from 0
    ffn: FFNConfig = field(default_factory=FFNConfig)


@dataclass(kw_only=True)
class SourceConfig:
    shards: str  # path of tar files, with braces ({000..007}) or a wildcard (*)
    upsampling: float = 1.0  # passes over this source in one epoch of the stream


@dataclass(kw_only=True)
class StreamConfig:
    """One of the three streams of pretraining."""

    batch_size: int = 0  # samples per optimiser step, over all ranks and accumulation steps; 0: stream off
    weight: float = 1.0  # of this stream's loss
    sources: list[SourceConfig] = field(default_factory=list)
    eval_shards: list[str] = field(default_factory=list)  # held-out shards, read whole and in order


@dataclass(kw_only=True)
class ExamplesSource:
    """An index file of labelled examples, and where their pictures lie (docs/data.md shows each format)."""

    index: str  # path; vqa: the questions; folders: the folder whose subfolders are the labels
    format: Literal["vqa", "coco", "karpathy", "instances", "nlvr2", "jsonl", "folders"] = "jsonl"
    annotations: str | None = None  # vqa: path of the answers; None: a test set
    images: str | None = None  # folder of the pictures, or shards (*.tar, braces too); None: the folder of the index
    image_name: str | None = None  # vqa: of a picture there, such as COCO_val2014_{image_id:012d}.jpg
    splits: list[str] = field(default_factory=list)  # karpathy: those to read; none: all
    held_out_images: int = 0  # pictures set aside, always the same ones (by a hash of their name)
    part: Literal["all", "rest", "held_out"] = "all"  # of it: everything, all but those pictures, or only those


@dataclass(kw_only=True)
class ExamplesConfig:
    """The stream of the fine-tunings."""

    batch_size: int = 0  # examples per optimiser step, over all ranks and accumulation steps
    sources: list[ExamplesSource] = field(default_factory=list)
    eval_sources: list[ExamplesSource] = field(default_factory=list)  # held out, read whole and in order


@dataclass(kw_only=True)
class TransformConfig:
    """Images. Flips are off by default: captions speak of left and right."""

    crop_scale: float = 0.8  # least share of the area that a random resized crop keeps; 1.0: plain resize
    flip: bool = False
    color_jitter: float = 0.0
    rand_augment: int = 0  # operations drawn per picture, each carried out with probability 1/2 (BEiT-3: 2)


@dataclass(kw_only=True)
class TextConfig:
    tokenizer: Literal["sentencepiece", "clip"] = "sentencepiece"
    model: str | None = None  # path of the sentencepiece model


@dataclass(kw_only=True)
class DataConfig:
    images: StreamConfig = field(default_factory=StreamConfig)
    texts: StreamConfig = field(default_factory=StreamConfig)
    pairs: StreamConfig = field(default_factory=StreamConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    text: TextConfig = field(default_factory=TextConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    workers: int = 2  # loader processes per rank; 0: load in the training process
    shuffle_shards: int = 64  # shards whose samples are shuffled together
    max_bad_fraction: float = 0.01  # of the samples read; more broken ones stop the run


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # learning rate of a layer relative to the next higher one
    head_lr_scale: float = 1.0  # learning rate of the heads relative to the last layer
    clip_norm: float | None = 3.0  # largest norm of the gradient; None or 0: no limit
    accumulate: int = 1  # forward-backward passes per optimiser step


@dataclass(kw_only=True)
class RunConfig:
    """What every task shares."""

    task: str
    out: str = "runs/debug"  # folder of the run
    steps: int = 1000  # optimiser steps; the learning rate schedule spans them
    stop_at: int | None = None  # save and stop after this step; the same recipe without it goes on
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast where the hardware has it
    compile: bool = False  # the Transformer blocks, by torch.compile: a minute at the start, then faster steps
    log_every: int = 10  # steps
    eval_every: int = 500  # steps
    checkpoint_every: int = 500  # steps
    keep_checkpoints: int = 2
    tensorboard: bool = False
    wandb_project: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(kw_only=True)
class VisualTokenizerConfig(RunConfig):
    """Vector-quantised knowledge distillation (BEiT v2): images -> discrete codes."""

    teacher: Literal["pixels"] = "pixels"
    image_size: int = 64
    patch_size: int = 8
    dim: int = 128
    depth: int = 3
    attn_heads: int = 4
    decoder_depth: int = 1
    num_codes: int = 8192
    code_dim: int = 32
    ema_decay: float = 0.99
    commitment: float = 1.0
    revive_after: int = 100  # steps that a code may go unused before it restarts at a patch of the batch


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """Masked data modelling on images, texts and pairs (BEiT-3)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: str | None = None  # folder of a run or checkpoint whose encoder to start from; None: from scratch
    visual_tokenizer: str | None = None  # run folder of a trained visual tokenizer; needed by images and pairs
    image_mask_ratio: float = 0.4
    text_mask_ratio: float = 0.15
    pair_text_mask_ratio: float = 0.5
    load_balancing: float = 1e-2  # weight of the load-balancing loss, summed over layers
    router_z: float = 0.0  # weight of the router z-loss, summed over layers
    cuda_graphs: bool = False  # as in a fine-tuning


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """What the fine-tunings share: an encoder and where it starts. They read `data.examples`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: str | None = None  # folder of a run or checkpoint whose encoder to start from; None: from scratch
    blind: bool = False  # pictures are grey, in training and after: the baseline that knows the texts alone
    freeze_routers: bool = False
    load_balancing: float = 1e-2  # weight of the load-balancing loss, summed over layers
    router_z: float = 0.0  # weight of the router z-loss, summed over layers
    cuda_graphs: bool = False  # one GPU plays recorded steps: no waiting for the host's launches; nothing elsewhere


@dataclass(kw_only=True)
class VQAConfig(FinetuneConfig):
    """Visual question answering as classification over the frequent answers."""

    labels: str | None = None  # file with an answer a line; None: the frequent answers of `data.examples.sources`
    min_answer_count: int = 9  # questions that an answer must be the answer of, to be a label
    loss: Literal["bce", "cross_entropy"] = "bce"  # bce: each answer by itself (BEiT-3); cross_entropy: one of them


@dataclass(kw_only=True)
class NLVR2Config(FinetuneConfig):
    """Is a sentence true of two pictures?"""


@dataclass(kw_only=True)
class ClassificationConfig(FinetuneConfig):
    """Image classification."""

    labels: str | None = None  # file with a label a line; None: those of `data.examples.sources`, sorted
    label_smoothing: float = 0.1


@dataclass(kw_only=True)
class RetrievalConfig(FinetuneConfig):
    """Which picture goes with a text, and which text with a picture: a dual encoder, trained by contrast."""


@dataclass(kw_only=True)
class CaptioningConfig(FinetuneConfig):
    """Writing captions, word by word. A caption has at most `model.max_text_length` tokens."""

    mask_ratio: float = 0.7  # of a caption's tokens, </s> included
    label_smoothing: float = 0.1
    beam_size: int = 3  # captions that the search follows at a time
    length_penalty: float = 0.6  # a caption's score is its log-probability / tokens ** this


SCHEMAS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "visual_tokenizer": VisualTokenizerConfig,
    "vqa": VQAConfig,
    "nlvr2": NLVR2Config,
    "retrieval": RetrievalConfig,
    "captioning": CaptioningConfig,
    "classification": ClassificationConfig,
}


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, the recipe it is based on, and `key=value` overrides, into its task's dataclass.

    Raises:
        UserError: missing file, broken YAML, unknown key (the nearest name is offered) or wrong type.
    """
    said = _read(Path(recipe), ())
    for text in overrides:
        _override(said, text, str(recipe))
    content = OmegaConf.to_container(said)  # interpolations as they are written
    task = cast(dict[str, Any], content).get("task")
    if not isinstance(task, str) or task not in SCHEMAS:
        raise UserError(f"{recipe}: task is {task!r}; choose one of {', '.join(SCHEMAS)}")
    check_keys(content, SCHEMAS[task], str(recipe))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SCHEMAS[task]), said)
        config = cast(RunConfig, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{recipe}: {f'{key}: ' if key else ''}{_first_line(error)}") from None
    check_ranges(asdict(config), str(recipe))
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved recipe, every default spelled out; `load` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(a: RunConfig | ModelConfig, b: RunConfig | ModelConfig) -> list[tuple[str, str]]:
    """(key, "key is x there and y here") for every setting in which two configurations differ."""
    one, other = _flat(asdict(a)), _flat(asdict(b))
    return [
        (key, f"{key} is {one.get(key)} there and {other.get(key)} here")
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def _flat(block: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(block, dict):
        return {
            k: v for name, each in block.items() for k, v in _flat(each, f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: list(block) if isinstance(block, tuple) else block}


def _read(recipe: Path, seen: tuple[Path, ...]) -> DictConfig:
    if not recipe.is_file():
        raise UserError(f"recipe {recipe} does not exist" + (f" (base of {seen[-1]})" if seen else ""))
    if recipe.resolve() in seen:
        raise UserError(f"{recipe}: its base leads back to itself; remove one `base:` line")
    try:
        said = OmegaConf.load(recipe)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{recipe} is not valid YAML: line {line}: {error.problem}") from None
    except Exception as error:  # PyYAML and OmegaConf each have their own family
        raise UserError(f"{recipe} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(said, DictConfig):
        raise UserError(f"{recipe}: a recipe is a mapping of keys to values")
    base = said.pop("base", None)
    if base is None:
        return said
    below = _read(recipe.parent / str(base), (*seen, recipe.resolve()))
    try:
        return cast(DictConfig, OmegaConf.merge(below, said))
    except (OmegaConfBaseException, TypeError):
        raise UserError(
            f"{recipe}: a list or a value stands where its base {base} has a mapping, or the reverse"
        ) from None


def _override(said: DictConfig, text: str, where: str) -> None:
    if not re.match(r"[A-Za-z_][\w.\[\]]*=", text):
        raise UserError(f"override {text!r} is not key=value")
    key, value = text.split("=", 1)
    try:
        OmegaConf.update(said, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True)
    except (OmegaConfBaseException, TypeError, IndexError, yaml.YAMLError) as error:
        raise UserError(f"override {text!r} does not fit {where}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
