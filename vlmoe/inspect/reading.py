"""What a pretrained model reads: the words it puts behind a mask, and the experts its patches hit."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmoe.data import Tokenizer, build_eval_loader, held_out_samples
from vlmoe.errors import UserError
from vlmoe.inspect.pictures import draw_codes, draw_experts, draw_texts
from vlmoe.inspect.routing import place_routings
from vlmoe.tasks import LoadedRun
from vlmoe.tasks.pretrain import Pretrain

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as sentencepiece writes the piece that is a space alone


@dataclass(frozen=True)
class Reading:
    """A caption as it was, as the model saw it, and as the model completed it."""

    original: str
    masked: str  # hidden pieces as `_`
    completed: str  # the model's words in [brackets]; wrong ones as [guess|truth]


@torch.no_grad()
def draw_samples(loaded: LoadedRun, folder: Path, *, count: int = 6, device: torch.device) -> dict[str, Path]:
    """Draw, for the first `count` held-out pairs, the codes, the words behind masks, and the experts of each patch.

    Fewer are drawn where there are fewer, or where some of them are broken.

    Returns:
        What each file shows -> its path: `codes.png`, `masked_text.png`, `experts.png` in `folder`.

    Raises:
        UserError: the run is not a pretraining on pairs, or has no held-out pairs.
    """
    task = loaded.task
    if not isinstance(task, Pretrain) or "pairs" not in task.streams or task.codes_of is None:
        raise UserError(f"{loaded.folder} is no pretraining run on pairs: there is nothing to draw")
    part = _first_pairs(loaded, task, count, device)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.png" for name in ("codes", "masked_text", "experts")}

    draw_codes(part["image"], task.codes_of, paths["codes"])
    readings = read_masked_text(loaded, part)
    lines = [f"saw   {each.masked}\nread  {each.completed}" for each in readings]
    draw_texts(part["image"], lines, paths["masked_text"])

    out = loaded.model(part["image"], part["text"], text_padding=part["text_padding"])
    placed = [each for each in place_routings(out, len(part["image"])) if not each.name.endswith(".text")]
    if placed:
        draw_experts(
            part["image"], placed, out.num_vision, paths["experts"], captions=[each.original for each in readings]
        )
    else:
        del paths["experts"]  # a dense model
    return paths


def read_masked_text(loaded: LoadedRun, part: dict[str, Tensor]) -> list[Reading]:
    """Complete the masked captions of a prepared batch of pairs."""
    task = loaded.task
    assert isinstance(task, Pretrain)
    hidden = part["text"].masked_fill(part["text_masked"], task.tokenizer.mask_id)
    out = loaded.model(
        part["image"], hidden, text_padding=part["text_padding"],
        image_masked=part["image_masked"], text_masked=part["text_masked"],
    )  # fmt: skip
    guesses = part["text"].masked_scatter(part["text_masked"], out.text_logits.argmax(-1))
    rows = (each.tolist() for each in (part["text"], part["text_masked"], part["text_padding"], guesses))
    return [_read(task.tokenizer, *row) for row in zip(*rows, strict=True)]


def _read(tokenizer: Tokenizer, truth: list[int], masked: list[bool], padding: list[bool], guess: list[int]) -> Reading:
    places = [i for i in range(len(truth)) if not padding[i] and truth[i] not in (tokenizer.bos_id, tokenizer.eos_id)]
    seen, completed = [], []
    for i in places:
        right, said = tokenizer.decode([truth[i]]), tokenizer.decode([guess[i]])
        seen.append("_" if masked[i] else right)
        shown = f"[{said or SPACE}]" if truth[i] == guess[i] else f"[{said or SPACE}|{right or SPACE}]"
        completed.append(shown if masked[i] else right)
    return Reading(
        tokenizer.decode([truth[i] for i in places]), " ".join(filter(None, seen)), " ".join(filter(None, completed))
    )


def _first_pairs(loaded: LoadedRun, task: Pretrain, count: int, device: torch.device) -> dict[str, Any]:
    samples = held_out_samples(loaded.config.data.pairs.eval_shards, "pairs")
    loader = build_eval_loader(
        samples, "pairs", task.prepare, seed=loaded.config.seed, batch_size=count, limit=4 * count, device=device,
        pad_id=task.pad_id, max_text_length=task.max_text_length,
    )  # fmt: skip
    for batch in islice(loader, 4):
        if batch.inputs:
            return batch.inputs["pairs"]
    raise UserError("data.pairs.eval_shards has no usable sample to draw")
