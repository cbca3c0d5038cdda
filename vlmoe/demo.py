"""The whole road in ten minutes on two cores: pictures, scenes, a visual tokenizer, an MH-MoE pretraining, what it sees."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vlmoe.config import load
from vlmoe.errors import UserError
from vlmoe.inspect.pictures import draw_losses
from vlmoe.inspect.reading import draw_samples
from vlmoe.tasks import load_run
from vlmoe.train.tracker import read_metrics
from vlmoe.train.trainer import evaluate, train

CHECKOUT = Path(__file__).parents[1]
DATA = Path("datasets/demo")
RUN = Path("runs/demo")


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
        if not (RUN / "scenes.png").is_file():  # what the script writes last
            _script(
                "scenes", "--bank", "datasets/scene_bank", "--out", str(DATA), "--train", "8000", "--val", "400",
                "--test", "0", "--pairs", "0", "--texts", "20000", "--image-size", "96", "--images", "none",
                "--sheet", str(RUN / "scenes.png"),
            )  # fmt: skip
        if not (DATA / "tokenizer.model").is_file():
            _script(
                "train_tokenizer", "--out", str(DATA / "tokenizer.model"), "--vocab-size", "2000",
                *map(str, sorted(DATA.glob("*train-*.tar"))),
            )  # fmt: skip
    with _timed(times, "visual tokenizer"):
        tokenizer = load("recipes/demo/visual_tokenizer.yaml")
        train(tokenizer)
    with _timed(times, "pretraining"):
        pretrain = load("recipes/demo/pretrain.yaml")
        train(pretrain)
    with _timed(times, "evaluation and pictures"):
        codes, figures = evaluate(Path(tokenizer.out), []), evaluate(Path(pretrain.out), [])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        paths = draw_samples(load_run(Path(pretrain.out), device, []), RUN, device=device)
        paths["losses"] = RUN / "losses.png"
        draw_losses(read_metrics(Path(pretrain.out)), paths["losses"])
        paths["scenes"] = RUN / "scenes.png"
    _report(codes, figures, times, paths)


def _report(
    codes: dict[str, float], figures: dict[str, float], times: dict[str, float], paths: dict[str, Path]
) -> None:
    text, unigram = figures["texts_text/perplexity"], figures["texts_text/unigram_perplexity"]
    seeing, blind = figures["pairs_text/perplexity"], figures["pairs_text_image_shuffled/perplexity"]
    print(f"\n{'on held-out scenes':<52}{'perplexity':>12}{'baseline':>12}")
    rows = [
        ("masked words of a text (baseline: unigram)", text, unigram),
        ("masked words of a caption (baseline: unigram)", seeing, figures["pairs_text/unigram_perplexity"]),
        ("  the same with another scene's image", blind, figures["pairs_text/unigram_perplexity"]),
        (
            "masked patches' codes (baseline: unigram)",
            figures["pairs_image/perplexity"],
            figures["pairs_image/unigram_perplexity"],
        ),
    ]
    for name, value, baseline in rows:
        print(f"{name:<52}{value:>12.2f}{baseline:>12.2f}")
    used = [value for name, value in figures.items() if name.endswith("/in_use")]
    print(f"{'visual codes in use':<52}{codes['codes_in_use']:>12.0f}")
    print(f"{'experts in use, fewest in any bank':<52}{min(used):>12.0f}\n")
    print(f"it reads:  {text:.2f} is {'below' if text < unigram / 4 else 'NOT below'} a quarter of {unigram:.2f}")
    print(
        f"it looks:  {seeing:.2f} with its image is {'below' if seeing < blind else 'NOT below'} {blind:.2f} with another\n"
    )
    for name, seconds in times.items():
        print(f"{name:<52}{seconds:>10.0f} s")
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{'together':<52}{sum(times.values()):>10.0f} s, {peak / 2**20:.1f} GiB at most\n\nto look at:")
    for name, path in paths.items():
        print(f"  {name:<14}{path}")


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
