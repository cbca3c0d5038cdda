"""The table of fine-tunings in docs/benchmarks/README.md, from the rows that finetune_table.py appended."""

import csv
from collections import defaultdict
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
HEADLINES = ("accuracy", "text_to_image/recall@1", "cider")  # what the page says of earlier runs
TYPE = "accuracy/question_type/"
ABOUT = """## Fine-tunings of the built-in scenes
Percent (CIDEr: times 100) on a thousand held-out scenes or pairs each, and perplexities of pretraining. *pretrained* starts
from `recipes/pretrain/small.yaml` (NLVR2: from the run of VQA that did), *scratch* from random weights, *blind* from random
weights too, with grey pictures: it knows the texts alone (steps are below). *Majority* gives the commonest answer to each type
of question, or the commonest label; *chance* is a ranking by lot. An empty cell was not measured.
"""
EARLIER = """Earlier runs, and such with another setting. Those of 60,000 scenes and of 240,000 with 0.5 restyled had linear
patches (`stem: linear`), later ones the convolutions of the recipes:
"""
Figures = dict[tuple[str, str, str, str], float]  # (task, metric, split, start)


def section(path: Path) -> str:
    """The figures of the newest run of each (task, start), then what earlier ones had. SystemExit: a column is missing or a
    value is no number."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    try:
        runs = {(row["task"], row["start"]): row for row in rows if row["steps"]}
        found: Figures = {}
        earlier: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        for row in rows:
            key, value = (row["task"], row["metric"], row["split"], row["start"]), float(row["value"])
            newest = runs.get((row["task"], row["start"]), row)
            if row["start"] in STARTS and (row["data"], row["steps"]) == (newest["data"], newest["steps"]):
                found[key] = value
            elif row["metric"] in HEADLINES:
                about = f"{row['start']}, {row['steps']} steps, {row['data']}"
                earlier[FIGURES[key[:2]], about][row["split"]] = value
        said = [
            f"{task} {start} {row['steps']} ({row['data']})" for (task, start), row in runs.items() if start in STARTS
        ]
        machines = dict.fromkeys(f"{row['hardware']}, torch {row['torch']}" for row in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path}: a column is missing or a value is no number: {error}") from None
    types = sorted({metric for _, metric, *_ in found if metric.startswith(TYPE)})
    every = [(task, metric, name) for (task, metric), name in FIGURES.items()]
    lines = [ABOUT, *_table(every, found), "", "VQA by type of question, on val:", ""]
    lines += _table([("vqa", metric, metric.removeprefix(TYPE)) for metric in types], found, splits=("val",))
    lines += ["", f"Steps: {', '.join(said)}. {'; '.join(machines)}.", "", *_earlier(earlier), COMMAND]
    return "\n".join(lines)


def _earlier(runs: dict[tuple[str, str], dict[str, float]]) -> list[str]:
    """A line for each figure of each run that another one has replaced, or that had a setting of its own."""
    lines = [
        f"- {figure}, {about}: {', '.join(f'{value:.1f} on {split}' for split, value in values.items())}"
        for (figure, about), values in runs.items()
    ]
    return [EARLIER, *lines, ""] if lines else []


COMMAND = """Made by, from `finetune.csv`:
```sh
python tools/finetune_table.py --at-once 4
```
"""


def _table(
    wanted: Iterable[tuple[str, str, str]],
    found: Figures,
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
