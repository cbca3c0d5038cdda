"""The whole road on two cores: scenes, a visual tokenizer, an MH-MoE pretraining, four fine-tunings, what they see."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vlmoe.config import FinetuneConfig, load
from vlmoe.data import Pixels, Sample, eval_transform, held_out_samples, open_examples, to_float
from vlmoe.errors import UserError
from vlmoe.inspect.pictures import draw_losses, draw_texts
from vlmoe.inspect.reading import draw_samples
from vlmoe.metrics import caption_scores
from vlmoe.tasks import load_run
from vlmoe.train.tracker import read_metrics
from vlmoe.train.trainer import train
from vlmoe.use import load as load_model

CHECKOUT = Path(__file__).parents[1]
DATA = Path("datasets/demo")
RUNS = Path("runs/demo")
FINETUNINGS = ("retrieval", "captioning", "vqa", "nlvr2")
SHOWN = 6  # scenes in a picture
PIXELS = 96  # side of a scene
PAIRS_OF_A_SENTENCE = 4


def demo() -> None:
    """Build, train, evaluate, draw; steps that are done already are not done again.

    Raises:
        UserError: not started in a checkout, or a step failed (it has said why).
    """
    if not (CHECKOUT / "data" / "bank.py").is_file():
        raise UserError("the demo runs in a checkout of the repository: its data scripts are not installed")
    times: dict[str, float] = {}
    with _timed(times, "pictures"):
        _script("bank", "--objects", "scene", "--out", "datasets/scene_bank", "--cache", "datasets/packages")
    with _timed(times, "scenes"):
        if not (RUNS / "scenes.png").is_file():  # what the script writes last
            _script(
                "scenes", "--bank", "datasets/scene_bank", "--out", str(DATA), "--kinds", "12", "--styles", "1",
                "--max-objects", "3", "--plain", "--train", "6000", "--val", "300", "--test", "0", "--pairs", "8000",
                "--statements", "each",
                "--texts", "12000", "--image-size", str(PIXELS), "--images", "none", "--sheet", str(RUNS / "scenes.png"),
            )  # fmt: skip
        if not (DATA / "tokenizer.model").is_file():
            _script(
                "train_tokenizer", "--out", str(DATA / "tokenizer.model"), "--vocab-size", "1500",
                *map(str, sorted(DATA.glob("train-*.tar"))), *map(str, sorted(DATA.glob("texts-train-*.tar"))),
            )  # fmt: skip
    for name in ("visual_tokenizer", "pretrain", *FINETUNINGS):
        with _timed(times, name.replace("_", " ")):
            train(load(CHECKOUT / "recipes" / "demo" / f"{name}.yaml"))
    with _timed(times, "pictures of it"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        paths = draw_samples(load_run(RUNS / "pretrain", device, []), RUNS, count=SHOWN, device=device)
        for name in ("captions", "answers", "statements", "losses", "scenes"):
            paths[name] = RUNS / f"{name}.png"
        draw_losses(read_metrics(RUNS / "pretrain"), paths["losses"])
        samples = [place.load() for place in held_out_samples([f"{DATA}/val-*.tar"], "pairs")[:SHOWN]]
        _draw_captions(paths["captions"], samples)
        _draw_answers(paths["answers"], samples)
        _draw_statements(paths["statements"])
    _report(times, paths)


def _report(times: dict[str, float], paths: dict[str, Path]) -> None:
    names = ("visual_tokenizer", "pretrain", *FINETUNINGS)
    codes, pretrain, retrieval, captioning, vqa, nlvr2 = (_figures(name) for name in names)
    floors = json.loads((DATA / "stats.json").read_text())["question_only_floors_on_val"]["all"]
    text, unigram = pretrain["texts_text/perplexity"], pretrain["texts_text/unigram_perplexity"]
    seeing, blind = pretrain["pairs_text/perplexity"], pretrain["pairs_text_image_shuffled/perplexity"]
    scenes = len(held_out_samples([f"{DATA}/val-*.tar"], "pairs"))
    print(f"\n{'on held-out scenes':<66}{'model':>10}{'baseline':>10}")
    for name, value, baseline in (
        ("perplexity of a text's masked words (unigram)", text, unigram),
        ("perplexity of a caption's masked words (unigram)", seeing, pretrain["pairs_text/unigram_perplexity"]),
        ("  (the same model with another scene's picture)", seeing, blind),
        ("perplexity of masked patches' codes (unigram)",
         pretrain["pairs_image/perplexity"], pretrain["pairs_image/unigram_perplexity"]),
        (f"% of texts whose picture is among the first 10 of {scenes} (chance)",
         retrieval["text_to_image/recall@10"], 1000 / scenes),
        ("CIDEr of captions (the same, each for another scene)", captioning["cider"], _cider_of_swapped_captions()),
        ("% of questions answered (the commonest answer to each wording)", vqa["accuracy"], 100 * floors["by_question"]),
        ("% of statements about two pictures told true from false (chance)", nlvr2["accuracy"], 50.0),
    ):  # fmt: skip
        print(f"{name:<66}{value:>10.2f}{baseline:>10.2f}")
    used = [value for name, value in pretrain.items() if name.endswith("/in_use")]
    print(f"{'visual codes in use':<66}{codes['codes_in_use']:>10.0f}")
    print(f"{'experts in use, fewest in any bank':<66}{min(used):>10.0f}\n")
    print(f"it reads:  {text:.2f} is {'below' if text < unigram / 4 else 'NOT below'} a quarter of {unigram:.2f}")
    print(f"it looks:  {seeing:.2f} with its picture is {'below' if seeing < blind else 'NOT below'} {blind:.2f}\n")
    for name, seconds in times.items():
        print(f"{name:<66}{seconds:>8.0f} s")
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{'together':<66}{sum(times.values()):>8.0f} s, {peak / 2**20:.1f} GiB at most\n\nto look at:")
    for name, path in paths.items():
        print(f"  {name:<14}{path}")


def _figures(run: str) -> dict[str, float]:
    """Of the last evaluation of a run."""
    return json.loads((RUNS / run / "metrics.json").read_text())["metrics"]


def _cider_of_swapped_captions() -> float:
    """What captions score that are good sentences of the wrong scenes."""
    said = json.loads((RUNS / "captioning" / "captions.json").read_text())
    annotations = json.loads((DATA / "coco" / "captions_val.json").read_text())["annotations"]
    references: dict[int, list[str]] = {}
    for each in annotations:
        references.setdefault(each["image_id"], []).append(each["caption"])
    swapped = {said[i]["image_id"]: said[i - 1]["caption"] for i in range(len(said))}
    return 100 * caption_scores(references, swapped)["cider"]


def _draw_captions(path: Path, samples: list[Sample]) -> None:
    """Held-out scenes beside what the fine-tuned model says of them, and one of the true captions."""
    said = load_model(RUNS / "captioning").caption([*_pictures(samples)])
    _draw(path, samples, [f"says  {each}\ntrue  {sample.texts[0]}" for each, sample in zip(said, samples, strict=True)])


def _draw_answers(path: Path, samples: list[Sample]) -> None:
    """Held-out scenes beside their questions, what the fine-tuned model answers, and the truth where that is another."""
    model, lines = load_model(RUNS / "vqa"), []
    for sample, picture in zip(samples, _pictures(samples), strict=True):
        found = model.answer(picture, [asked["question"] for asked in sample.meta["questions"]], top_k=1)
        answers = zip(sample.meta["questions"], (best.text for best, *_ in found), strict=True)
        lines.append("\n".join(_answered(asked, said) for asked, said in answers))
    _draw(path, samples, lines)


def _draw_statements(path: Path) -> None:
    """Held-out pairs of scenes beside what is said of them, and what the fine-tuned model holds of it."""
    model = load_model(RUNS / "nlvr2")
    assert isinstance(model.config, FinetuneConfig)
    examples = open_examples(model.config.data.examples.eval_sources, recipe_key="data.examples.eval_sources")
    pictures, lines = [], []
    for number in range(SHOWN):
        sample = examples.place(PAIRS_OF_A_SENTENCE * number + number % PAIRS_OF_A_SENTENCE).load()
        assert sample.image is not None and sample.image_b is not None
        said = str(model.is_true(sample.texts[0], sample.image, sample.image_b))
        lines.append(_answered({"question": sample.texts[0], "answer": sample.meta["label"]}, said))
        left, right = _enlarged(sample.image), _enlarged(sample.image_b)
        pictures.append(torch.cat([left, left.new_full((3, 2 * PIXELS, 6), 128), right], dim=-1))
    draw_texts(to_float(torch.stack(pictures)), lines, path)


def _draw(path: Path, samples: list[Sample], lines: list[str]) -> None:
    draw_texts(to_float(torch.stack([_enlarged(picture) for picture in _pictures(samples)])), lines, path)


def _enlarged(picture: Pixels) -> Pixels:
    return eval_transform(picture, image_size=2 * PIXELS)


def _pictures(samples: list[Sample]) -> list[Pixels]:
    return [sample.image for sample in samples if sample.image is not None]


def _answered(asked: dict[str, str], said: str) -> str:
    return f"{asked['question']:<48}{said}" + ("" if said == asked["answer"] else f" (it is {asked['answer']})")


def _script(name: str, *arguments: str) -> None:
    """Run one of the scripts in data/; its own messages say what went wrong."""
    done = subprocess.run([sys.executable, str(CHECKOUT / "data" / f"{name}.py"), *arguments], check=False)
    if done.returncode:
        raise UserError(
            f"data/{name}.py stopped (see above); mend that and start the demo again, it goes on from there"
        )


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    print(f"\n== {name}", file=sys.stderr, flush=True)
    started = time.monotonic()
    yield
    times[name] = time.monotonic() - started
