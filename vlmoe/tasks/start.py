"""Where a model starts from: the encoder, and the heads that fit, of another run or of a converted checkpoint."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from vlmoe.config import FinetuneConfig, ModelConfig, PretrainConfig, RunConfig, differences, load
from vlmoe.data.text import tokenizer_digest
from vlmoe.errors import UserError
from vlmoe.models.encoder import Encoder
from vlmoe.models.weights import latest_checkpoint, read_tensors
from vlmoe.nn.embed import UNUSED_ROWS, resize_positions

StartingConfig = PretrainConfig | FinetuneConfig
# beside a checkpoint's tensors: digests of what it was trained with
DIGESTS = TOKENIZER_FILE, VISUAL_TOKENIZER_FILE = "tokenizer.txt", "visual_tokenizer.txt"
FREE = {"image_size", "max_text_length", "drop_path", "ffn.backend", "ffn.capacity_factor"}  # need not equal init's


def start_encoder(encoder: Encoder, config: StartingConfig, vocab_size: int) -> None:
    """Fill an encoder from the run or checkpoint `config.init`; heads there are not looked at.

    The position table of patches is resampled to this image size; those of a longer text, and rows of the token table
    beyond `vocab_size` (released checkpoints have eight that nothing reads), are cut off. A norm after the last layer that
    this task's model lacks is left out, as in the released models; one that the run lacks (VQA, classification) starts anew.

    Raises:
        UserError: there is no checkpoint, or it holds another encoder or another tokenizer.
    """
    if config.init is None:
        return
    folder = latest_checkpoint(Path(config.init))
    source = load(folder / "recipe.yaml")
    _check_same_encoder(config, source, folder)
    prefix = "encoder."
    saved = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_tensors(folder / "model.safetensors").items()
        if name.startswith(prefix)
    }
    own = encoder.state_dict()
    for name, table in own.items():
        if name not in saved and name.startswith("norm."):
            saved[name] = table
        elif name not in saved:
            raise UserError(f"init: {folder} has no tensor {prefix + name!r}; start from another run")
        if name == "vision_embed.positions":
            saved[name] = resize_positions(saved[name], config.model.image_size // config.model.patch_size)
        elif name == "text_embed.positions":
            if len(saved[name]) < len(table):
                raise UserError(
                    f"init: {folder} has positions for {len(saved[name]) - UNUSED_ROWS} tokens; "
                    f"set model.max_text_length to at most that"
                )
            saved[name] = saved[name][: len(table)]
        elif name == "text_embed.tokens.weight":
            if len(saved[name]) < vocab_size:
                raise UserError(
                    f"init: {folder} has {len(saved[name])} token vectors and the tokenizer {vocab_size} ids; "
                    f"set data.text to the tokenizer that it was trained with"
                )
            saved[name] = saved[name][:vocab_size]
        if saved[name].shape != table.shape:
            raise UserError(
                f"init: {name} is {list(saved[name].shape)} in {folder} and {list(table.shape)} in this recipe"
            )
    encoder.load_state_dict({name: saved[name] for name in own})


def start_heads(model: nn.Module, config: StartingConfig) -> None:
    """Fill the heads that `config.init` has too, by name and shape, as the released code does: the word head of
    pretraining for captions, both projections and the temperature of a contrastive stage for retrieval."""
    if config.init is None:
        return
    saved = read_tensors(latest_checkpoint(Path(config.init)) / "model.safetensors")
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.")}
    there = {name: saved[name] for name, tensor in own.items() if name in saved and saved[name].shape == tensor.shape}
    model.load_state_dict(there, strict=False)


def _check_same_encoder(config: StartingConfig, source: RunConfig, folder: Path) -> None:
    if not isinstance(source, StartingConfig):
        raise UserError(f"init: {folder} is a run of task {source.task}, which has no encoder to start from")
    changed = [line for key, line in differences(_plain(source.model), _plain(config.model)) if key not in FREE]
    if changed:
        raise UserError(
            f"init: {folder} holds another encoder: model.{changed[0]}; give this recipe the model block of its"
        )
    ours, its = config.data.text, source.data.text
    if ours.tokenizer != its.tokenizer:
        raise UserError(f"init: {folder} was trained with tokenizer {its.tokenizer}; set data.text.tokenizer to it")
    known = read_beside(folder, TOKENIZER_FILE)
    if known is None and its.model is not None and Path(its.model).is_file():
        known = tokenizer_digest(its)
    if known not in (None, tokenizer_digest(ours)):
        raise UserError(
            f"init: {folder} was trained with another tokenizer than {ours.model}; set data.text.model to its"
        )


def read_beside(folder: Path, name: str) -> str | None:
    """A text that a checkpoint carries beside its tensors, if it does."""
    return (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else None


def _plain(model: ModelConfig) -> ModelConfig:
    """Without what a dense model does not heed: the settings of sparse layers."""
    ffn = model.ffn
    if ffn.kind == "dense":
        plain = type(ffn)(kind="dense", activation=ffn.activation, dense_dim=ffn.dense_dim or 4 * model.dim)
        return replace(model, ffn=plain)
    return model
