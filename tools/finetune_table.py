"""Fine-tune on the built-in scenes from several starts, score on every held-out split, and append the figures to a CSV.

python tools/finetune_table.py --starts pretrained scratch blind --at-once 4

pretrained: the recipe as it is. scratch: without its `init`. blind: like scratch, with grey pictures, so that only the texts
are left. Majority and chance are beside them: the answer that training has most often for a type of question, and
a ranking or a label by lot. Runs that are complete are scored again without training. Steps, unless given, are the recipes'.
A recipe whose `init` is the run of another one of these tasks waits for that.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_table import append_row

from vlmoe.config import ExamplesSource, FinetuneConfig, load
from vlmoe.data.examples import open_examples
from vlmoe.errors import UserError
from vlmoe.metrics import vqa_accuracy
from vlmoe.models.weights import latest_checkpoint
from vlmoe.tasks.vqa import official_annotation
from vlmoe.train.trainer import evaluate, train

ROOT = Path(__file__).parents[1]
TASKS = ("vqa", "retrieval", "captioning", "nlvr2")
STARTS = {"pretrained": [], "scratch": ["init=null"], "blind": ["init=null", "blind=true"]}
SPLITS = ("val", "test", "test_style", "test_combination", "test_concept")


def recipe_of(task: str) -> Path:
    return ROOT / "recipes" / task / "scenes_small.yaml"


def run_one(
    task: str, start: str, splits: Sequence[str], overrides: Sequence[str], gpu: int, out: Path, data: str
) -> None:
    """Train one run, in a process of its own, and score it; each split's rows are in `out` before the next is scored. What
    the run prints goes to a log in its folder."""
    os.environ["LOCAL_RANK"] = str(gpu)  # by which a process picks its GPU
    config = load(recipe_of(task), [*overrides, *STARTS[start]])
    assert isinstance(config, FinetuneConfig)
    run = Path(f"{config.out}_{start}")
    if before := task_before(task, start, overrides):
        config = replace(config, init=f"{load(recipe_of(before), overrides).out}_{start}")
    run.mkdir(parents=True, exist_ok=True)
    with (run / "output.log").open("a") as log:
        sys.stdout = sys.stderr = log
        started = time.monotonic()
        outcome = train(replace(config, out=str(run)))
        about = {"task": task, "start": start, "steps": config.steps}
        about["train_seconds"] = round(time.monotonic() - started)
        for split in splits:
            sources = json.dumps([as_split(each, split) for each in config.data.examples.eval_sources])
            is_known = split == "val" and bool(outcome.metrics)  # its last step was scored
            figures = outcome.metrics if is_known else evaluate(run, [f"data.examples.eval_sources={sources}"])
            rows = [about | {"split": split, "metric": name, "value": value} for name, value in figures.items()]
            append(out, rows, data)


def task_before(task: str, start: str, overrides: Sequence[str]) -> str | None:
    """The task whose run this one starts from, if it is one of the table's."""
    init = getattr(load(recipe_of(task), [*overrides, *STARTS[start]]), "init", None)
    return next((each for each in TASKS if load(recipe_of(each), overrides).out == init), None)


def as_split(source: ExamplesSource, split: str) -> dict[str, Any]:
    """The source of another split of the same scenes: `val` stands for the split in its file names."""
    return {
        key: re.sub(r"(?<![a-z])val(?![a-z])", split, value) if isinstance(value, str) and key != "format" else value
        for key, value in vars(source).items()
        if value is not None
    }


def of_pretraining(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The figures of the run that the fine-tunings start from, on its held-out samples, as its last step left them."""
    config = load(recipe_of("vqa"), overrides)
    assert isinstance(config, FinetuneConfig) and config.init is not None
    run = Path(config.init)
    steps = load(latest_checkpoint(run) / "recipe.yaml").steps
    if not (run / "metrics.json").is_file():
        raise UserError(f"{run} has no metrics.json, for its last step was not reached: vlmoe evaluate {run} writes it")
    figures = json.loads((run / "metrics.json").read_text())["metrics"]
    about = {"recipe": "recipes/pretrain/small.yaml", "task": "pretrain", "start": "scratch", "steps": steps}
    return [
        about | {"train_seconds": "", "split": "val", "metric": name, "value": each} for name, each in figures.items()
    ]


def without_looking(task: str, splits: Sequence[str], overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What majority and chance give."""
    config = load(recipe_of(task), overrides)
    assert isinstance(config, FinetuneConfig)
    trained: Iterable[Any] = ()
    if task == "vqa":
        trained = open_examples(config.data.examples.sources, recipe_key="data.examples.sources")
    rows = []
    for split in splits:
        sources = [ExamplesSource(**as_split(each, split)) for each in config.data.examples.eval_sources]
        examples = [*open_examples(sources, recipe_key="data.examples.eval_sources")]
        if task == "vqa":
            start, figures = "majority", majority(trained, examples)
        elif task == "nlvr2":
            labels = Counter(each.meta["label"] for each in examples)
            start, figures = "majority", {"accuracy": 100 * max(labels.values()) / len(examples)}
        elif task == "retrieval":
            start, figures = "chance", {f"text_to_image/recall@{k}": 100 * k / len(examples) for k in (1, 5, 10)}
            figures |= {f"image_to_text/recall@{k}": value for k, value in _chance_of_texts(examples).items()}
        else:
            return []
        about = {"task": task, "start": start, "steps": "", "train_seconds": "", "split": split}
        rows += [about | {"metric": name, "value": value} for name, value in figures.items()]
    return rows


def majority(trained: Iterable[Any], asked: Iterable[Any]) -> dict[str, float]:
    """VQA accuracy of the commonest answer to each type of question."""
    common: dict[str, Counter[str]] = defaultdict(Counter)
    for each in trained:
        common[each.meta["question_type"]][each.meta["multiple_choice_answer"]] += 1
    annotations, answers = [], []
    for each in asked:
        annotations.append(official_annotation({**each.meta, "id": each.id}))
        answers.append({"question_id": each.id, "answer": common[each.meta["question_type"]].most_common(1)[0][0]})
    found = vqa_accuracy({"annotations": annotations}, answers)
    types = {f"accuracy/question_type/{name}": value for name, value in found["per_question_type"].items()}
    return {"accuracy": found["overall"], **types}


def _chance_of_texts(examples: Sequence[Any]) -> dict[int, float]:
    """That one of a picture's texts is among the first k of all of them, by lot."""
    texts = sum(len(each.texts) for each in examples)
    own = texts / len(examples)
    missed = dict.fromkeys((1, 5, 10), 1.0)
    for k in missed:
        for drawn in range(k):
            missed[k] *= max(texts - own - drawn, 0) / max(texts - drawn, 1)
    return {k: 100 * (1 - each) for k, each in missed.items()}


def scenes_of(overrides: Sequence[str]) -> str:
    """What the recipes train on, as the manifest of the scenes has it: "240000 scenes, 0.7 restyled and icons"."""
    config = load(recipe_of("vqa"), overrides)
    assert isinstance(config, FinetuneConfig)
    manifest = Path(config.data.examples.sources[0].index).parents[1] / "manifest.json"
    try:
        made = json.loads(manifest.read_text(encoding="utf-8"))
        scenes, restyled = made["scenes"]["train"], made["layout"].get("restyled", 0)
        icons = " and icons" if restyled and made.get("icons") else ""
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{manifest} does not say what was made; make the scenes with data/scenes.py") from None
    return f"{scenes} scenes" + (f", {restyled} restyled{icons}" if restyled else "")


def append(path: Path, rows: Iterable[dict[str, Any]], data: str) -> None:
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for row in rows:
        about = {
            "hardware": hardware,
            "torch": torch.__version__,
            "recipe": str(recipe_of(row["task"]).relative_to(ROOT)),
            "data": data,
        }
        append_row(path, about | row | {"value": round(row["value"], 3)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=TASKS)
    add("--starts", nargs="+", choices=STARTS, default=STARTS)
    add("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    add("--at-once", type=int, default=1, help="runs beside each other (default: 1)")
    add("--gpus", type=int, default=1, help="GPUs to spread them over (default: 1)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every recipe")
    add("--steps", nargs="+", default=[], metavar="TASK=STEPS", help="overrides of steps, by task or by task.start")
    add("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "finetune.csv")
    args = parser.parse_args()
    if args.gpus > max(1, there := torch.cuda.device_count()):
        raise UserError(f"--gpus {args.gpus}: this machine has {there}")
    steps = dict(each.split("=", 1) for each in args.steps)
    data = scenes_of(args.set)
    jobs = [(task, start) for start in args.starts for task in args.tasks if (task, start) != ("retrieval", "blind")]
    before = {(task, start): (task_before(task, start, args.set), start) for task, start in jobs}
    waiting, failed = jobs.copy(), False
    running: dict[Future[None], tuple[tuple[str, str], int]] = {}
    with ProcessPoolExecutor(args.at_once, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        while waiting or running:
            unfinished = {*waiting, *(job for job, _ in running.values())}
            ready = [job for job in waiting if before[job] not in unfinished]
            for task, start in ready[: args.at_once - len(running)]:
                waiting.remove((task, start))
                number = steps.get(f"{task}.{start}", steps.get(task))
                said = [
                    *args.set,
                    *(f"{key}={number}" for key in ("steps", "eval_every", "checkpoint_every") if number),
                ]
                gpu = min(range(args.gpus), key=[used for _, used in running.values()].count)
                done = pool.submit(run_one, task, start, args.splits, said, gpu, args.out, data)
                running[done] = (task, start), gpu
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                (task, start), _ = running.pop(done)
                try:
                    done.result()
                    print(f"{task} {start}: done", flush=True)
                except UserError as error:
                    print(f"{task} {start}: {error}", file=sys.stderr, flush=True)
                    failed = True
    if "pretrained" in args.starts:
        for task in args.tasks:
            append(args.out, without_looking(task, args.splits, args.set), data)
        append(args.out, of_pretraining(args.set), data)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"finetune_table.py: {error}")
