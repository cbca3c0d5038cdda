"""A released BEiT-3 checkpoint -> one of this project, which any fine-tuning recipe can start from; and back.

    python tools/convert_checkpoint.py beit3_base_patch16_224.pth --tokenizer beit3.spm \\
        --out checkpoints/beit3_base_patch16_224
    python tools/convert_checkpoint.py beit3_base_patch16_480_coco_captioning.pth \\
        --recipe recipes/captioning/coco_base.yaml --out checkpoints/captioning_coco_base
    python tools/convert_checkpoint.py runs/vqa --out vqa.pth --released-sizes

The first is for `init` in a recipe. The second takes the data and the text length of a recipe along, so that
`vlmoe evaluate` and `vlmoe predict` work on it. The task of a .pth is read from the names of its heads. Token rows beyond
the tokenizer's ids, which no text uses (released tables have 8), are left out. `--released-sizes` fills the tables up
again with rows that nothing reads or predicts, so that the released code can load them.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmoe import __version__
from vlmoe.config import (
    SCHEMAS,
    ClassificationConfig,
    DataConfig,
    FFNConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    TextConfig,
    VQAConfig,
    load,
    to_yaml,
)
from vlmoe.data import load_tokenizer
from vlmoe.errors import UserError
from vlmoe.models import (
    Encoder,
    beit3_from_state_dict,
    beit3_task_from_state_dict,
    beit3_to_state_dict,
    build_encoder,
)
from vlmoe.models.convert import PREFIX, TASK_MODELS
from vlmoe.models.encoder import Block
from vlmoe.models.weights import latest_checkpoint, read_tensors
from vlmoe.nn.embed import UNUSED_ROWS
from vlmoe.nn.ffn import FeedForward
from vlmoe.tasks.labels import LABELS_FILE, labels_text

# a head that only this task's model has; the first that is there decides
TASK_OF_HEAD = {
    "mim_head.weight": "pretrain",
    "mlm_head.weight": "captioning",
    "pooler.dense.weight": "vqa",
    "head.dense1.weight": "nlvr2",
    "vision_head.weight": "retrieval",
    "fc_norm.weight": "classification",
}
TOKEN_ROWS = ("encoder.text_embed.tokens.weight", "mlm_head.weight", "mlm_head.bias")
TEXT_POSITIONS = "encoder.text_embed.positions"
VOCAB_ROWS, TEXT_ROWS = 64010, 1024  # of the released tables
NEVER_PREDICTED = -1e4  # logit of a row that stands for no token; float16 holds it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .pth file; or the folder of a run or checkpoint, to go back")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; going back, the .pth")
    parser.add_argument("--tokenizer", type=Path, help="sentencepiece model of the .pth; left out: that of --recipe")
    parser.add_argument("--recipe", type=Path, help="recipe of a fine-tuned .pth")
    parser.add_argument("--labels", type=Path, help="answer2label.txt of a VQA or classification .pth, with --recipe")
    parser.add_argument("--attn-heads", type=int, help="left out: width / 64, as all released models have")
    parser.add_argument("--image-size", type=int, help="pixels; left out: the checkpoint's own")
    parser.add_argument("--released-sizes", action="store_true", help="going back: tables as long as the released ones")
    args = parser.parse_args()
    try:
        if args.source.is_dir():
            sizes = {"vocab_rows": VOCAB_ROWS, "text_rows": TEXT_ROWS} if args.released_sizes else {}
            to_official(args.source, args.out, **sizes)
        else:
            to_project(
                args.source, args.out, tokenizer=args.tokenizer, recipe=args.recipe, labels=args.labels,
                attn_heads=args.attn_heads, image_size=args.image_size,
            )  # fmt: skip
    except UserError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def to_project(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    recipe: Path | None = None,
    labels: Path | None = None,
    attn_heads: int | None = None,
    image_size: int | None = None,
) -> None:
    """Write a checkpoint folder (model.safetensors, recipe.yaml, state.json, labels.txt where there are labels).

    Raises:
        UserError: `out` exists, the file is no BEiT-3 checkpoint, or tokenizer, recipe or labels do not go with it.
    """
    if out.exists():
        raise UserError(f"{out} exists; delete it or choose another --out")
    state = read_pth(source)
    width = state["beit3.text_embed.weight"].shape[-1] if "beit3.text_embed.weight" in state else 0
    attn_heads = attn_heads or max(1, width // 64)
    task = next((task for head, task in TASK_OF_HEAD.items() if head in state), "pretrain")
    if task == "pretrain":
        encoder = beit3_from_state_dict(state, attn_heads=attn_heads, image_size=image_size)
        tensors = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        tensors |= {key: tensor for key, tensor in state.items() if not key.startswith(PREFIX)}
    else:
        model = beit3_task_from_state_dict(task, state, attn_heads=attn_heads, image_size=image_size)
        encoder, tensors = model.encoder, model.state_dict()
    config = _config(task, encoder, tokenizer, recipe, source)
    answers = None if labels is None else read_answer2label(labels)
    if answers is not None and not isinstance(config, (VQAConfig, ClassificationConfig)):
        raise UserError(f"{source} is a model of task {task}, which has no labels: leave out --labels")
    if answers is not None and len(answers) != (classes := len(tensors[TASK_MODELS[task][1]])):
        raise UserError(f"{labels} has {len(answers)} labels, but {source} tells {classes} apart: name its own labels")

    vocab_size, rows = load_tokenizer(config.data.text).vocab_size, len(tensors[TOKEN_ROWS[0]])
    if vocab_size > rows:
        raise UserError(
            f"{config.data.text.model} has {vocab_size} ids, but {source} has rows for {rows}: name its own tokenizer"
        )
    for name in TOKEN_ROWS:
        if name in tensors:
            tensors[name] = tensors[name][:vocab_size]
    tensors[TEXT_POSITIONS] = tensors[TEXT_POSITIONS][: UNUSED_ROWS + config.model.max_text_length]
    files = {
        "recipe.yaml": to_yaml(config),
        "state.json": json.dumps({"step": 0, "source": source.name, "vlmoe": __version__}, indent=1),
        **({} if answers is None else {LABELS_FILE: labels_text(answers)}),
    }
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    owned = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(owned, partial / "model.safetensors")
    for name, content in files.items():
        (partial / name).write_text(content, encoding="utf-8")
    partial.rename(out)


def to_official(source: Path, out: Path, *, vocab_rows: int = 0, text_rows: int = 0) -> None:
    """Write a .pth with the official names from a run or checkpoint whose encoder is decoupled and dense.

    `vocab_rows` and `text_rows` are what the token tables and the text position table are filled up to.

    Raises:
        UserError: the encoder has no place in the official layout, or has longer tables.
    """
    folder = latest_checkpoint(source)
    tensors, config = read_tensors(folder / "model.safetensors"), load(folder / "recipe.yaml")
    if not isinstance(config, (PretrainConfig, FinetuneConfig)):
        raise UserError(f"{folder} is of task {config.task}, which has no encoder")
    has_norm = any(name.startswith("encoder.norm.") for name in tensors)
    with torch.device("meta"):
        encoder = build_encoder(config.model, len(tensors[TOKEN_ROWS[0]]), final_norm=has_norm)
    own = {name.removeprefix("encoder."): each for name, each in tensors.items() if name.startswith("encoder.")}
    encoder.load_state_dict(own, assign=True)
    state = beit3_to_state_dict(encoder)
    state |= {name: each for name, each in tensors.items() if not name.startswith("encoder.")}
    for name, rows, fill in (
        ("beit3.text_embed.weight", vocab_rows, 0.0),
        ("mlm_head.weight", vocab_rows, 0.0),
        ("mlm_head.bias", vocab_rows, NEVER_PREDICTED),
        ("beit3.encoder.embed_positions.B.weight", text_rows, 0.0),
    ):
        if rows and name in state:
            table = state[name]
            if len(table) > rows:
                raise UserError(f"{folder}: {name} has {len(table)} rows, more than the released {rows}")
            state[name] = torch.cat([table, table.new_full((rows - len(table), *table.shape[1:]), fill)])
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": state}, out)


def read_pth(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, alone or under "model" or "module"; nothing else in it is executed."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a .pth file, or the folder of a run")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # files of one's own hold the options of the run
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each way of being damaged has its own; torch's text tells how to execute it anyway
        raise UserError(
            f"{path} is not a file of tensors and plain values, or is damaged ({type(error).__name__}); nothing in it was run"
        ) from None
    if isinstance(content, Mapping):
        content = next((content[key] for key in ("model", "module") if key in content), content)
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"{path} holds no state dict, alone or under 'model' or 'module'")
    return dict(content)


def read_answer2label(path: Path) -> list[str]:
    """The labels of an answer2label.txt: a JSON object a line, {"answer": ..., "label": its line number}."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if [row["label"] for row in rows] != list(range(len(rows))):
            raise UserError(f"{path}: the labels must count the lines from 0")
        return [row["answer"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an answer2label.txt ({error})") from None


def _config(
    task: str, encoder: Encoder, tokenizer: Path | None, recipe: Path | None, source: Path
) -> PretrainConfig | FinetuneConfig:
    """The recipe of the new checkpoint: `recipe` with this encoder, or one that says no more than the encoder."""
    block = encoder.layers[0]
    assert isinstance(block, Block)
    dense = next(module for module in block.modules() if isinstance(module, FeedForward))
    model = ModelConfig(
        dim=encoder.dim,
        depth=len(encoder.layers),
        attn_heads=block.attention.attn_heads,
        image_size=encoder.vision_embed.image_size,
        patch_size=encoder.vision_embed.patch_size,
        max_text_length=encoder.text_embed.max_length,
        ffn=FFNConfig(kind="dense", dense_dim=dense.fc1.out_features),
    )
    if recipe is None:
        if tokenizer is None:
            raise UserError("--tokenizer is missing: name the sentencepiece model that the checkpoint was trained with")
        config = SCHEMAS[task](task=task, data=DataConfig(text=TextConfig(model=str(tokenizer))))
        assert isinstance(config, (PretrainConfig, FinetuneConfig))
        config.model = model
        return config
    config = load(recipe)
    if config.task != task or not isinstance(config, FinetuneConfig):
        raise UserError(f"{source} is a model of task {task}, but {recipe} is of task {config.task}")
    config.model = replace(model, max_text_length=min(model.max_text_length, config.model.max_text_length))
    config.init = None
    if tokenizer is not None:
        config.data.text = TextConfig(model=str(tokenizer))
    return config


if __name__ == "__main__":
    sys.exit(main())
