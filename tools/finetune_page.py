"""The table of fine-tunings in docs/benchmarks/README.md, from the rows that finetune_table.py appended."""

import csv
from collections.abc import Iterable
from pathlib import Path

STARTS = ("pretrained", "scratch", "blind", "majority", "chance")
SPLITS = {"val": "held-out scenes (val)", "test": "held-out scenes (test)", "test_style": "an unseen drawing style",
          "test_combination": "unseen combinations", "test_concept": "unseen kinds"}  # fmt: skip
FIGURES = {  # task, metric -> how the page calls it
    ("vqa", "accuracy"): "VQA accuracy",
    ("retrieval", "text_to_image/recall@1"): "text to image, recall@1",
    ("retrieval", "text_to_image/recall@5"): "text to image, recall@5",
    ("retrieval", "text_to_image/recall@10"): "text to image, recall@10",
    ("captioning", "cider"): "captions, CIDEr",
    ("nlvr2", "accuracy"): "NLVR2 accuracy",
    ("pretrain", "pairs_text/perplexity"): "pretraining: perplexity of a caption's masked words",
    ("pretrain", "pairs_text_image_shuffled/perplexity"): "the same with another scene's picture",
    ("pretrain", "pairs_text/unigram_perplexity"): "the same of unigrams",
}
TYPE = "accuracy/question_type/"
ABOUT = """## Fine-tunings of the built-in scenes
Percent (CIDEr: times 100) on a thousand held-out scenes or pairs each, and perplexities of pretraining. *pretrained* starts
from `recipes/pretrain/small.yaml` (NLVR2: from the run of VQA that did), *scratch* from random weights, *blind* from random
weights too, with grey pictures: it knows the texts alone (steps are below). *Majority* gives the commonest answer to each type
of question, or the commonest label; *chance* is a ranking by lot. An empty cell was not measured.
"""


def section(path: Path) -> str:
    """The newest figure of each (metric, split, start). SystemExit: a column is missing or a value is no number."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    try:
        found = {(row["task"], row["metric"], row["split"], row["start"]): float(row["value"]) for row in rows}
        runs = {(row["task"], row["start"]): row for row in rows if row["steps"]}
        said = [f"{task} {start} {row['steps']} ({row['data']})" for (task, start), row in runs.items()]
        machines = dict.fromkeys(f"{row['hardware']}, torch {row['torch']}" for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path}: a column is missing or a value is no number: {error}") from None
    types = sorted({metric for _, metric, *_ in found if metric.startswith(TYPE)})
    every = [(task, metric, name) for (task, metric), name in FIGURES.items()]
    lines = [ABOUT, *_table(every, found), "", "VQA by type of question, on val:", ""]
    lines += _table([("vqa", metric, metric.removeprefix(TYPE)) for metric in types], found, splits=("val",))
    lines += ["", *_variants(found)]
    return "\n".join([*lines, "", f"Steps: {', '.join(said)}. {'; '.join(machines)}.", "", COMMAND])


def _variants(found: dict[tuple[str, str, str, str], float]) -> Iterable[str]:
    """Starts with a setting that is not the recipe's: a line each."""
    for (task, metric, split, start), value in found.items():
        if start not in STARTS and (task, metric) in FIGURES:
            yield f"- {FIGURES[task, metric]} on {SPLITS[split]}, {start}: {value:.1f}"


COMMAND = """Made by, from `finetune.csv`:
```sh
python tools/finetune_table.py --at-once 4
```
"""


def _table(
    wanted: Iterable[tuple[str, str, str]],
    found: dict[tuple[str, str, str, str], float],
    splits: Iterable[str] = tuple(SPLITS),
) -> list[str]:
    lines = [f"| figure | on | {' | '.join(STARTS)} |", "|---|---|" + "---:|" * len(STARTS)]
    for task, metric, name in wanted:
        for split in splits:
            values = [found.get((task, metric, split, start)) for start in STARTS]
            if any(value is not None for value in values[:3]):
                style = ".2f" if metric.endswith("perplexity") else ".1f"
                cells = ["" if value is None else format(value, style) for value in values]
                lines.append(f"| {name} | {SPLITS[split]} | {' | '.join(cells)} |")
    return lines
