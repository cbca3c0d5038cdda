"""Where the numbers of a run go: `metrics.jsonl` always, a progress line, TensorBoard and W&B where asked for."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vlmoe.config import RunConfig, to_yaml
from vlmoe.errors import UserError
from vlmoe.train.checkpoint import clear_disk_errors

SMOOTHING = 0.3  # weight of the newest rate


class Tracker:
    """Writes `metrics.jsonl` as one JSON object per line; lines after `first_step` of an earlier life are dropped."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self.run, self.steps = Path(config.out), config.steps
        self.path = self.run / "metrics.jsonl"
        with clear_disk_errors(self.path):
            self.run.mkdir(parents=True, exist_ok=True)
            (self.run / "recipe.yaml").write_text(to_yaml(config))
            _drop_later_lines(self.path, first_step)
        self.last_step, self.last_time, self.rate = first_step, time.monotonic(), 0.0
        self.is_terminal = sys.stderr.isatty()
        self.writers = [
            *([_tensorboard(self.run)] if config.tensorboard else []),
            *([_wandb(config)] if config.wandb_project else []),
        ]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with clear_disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for write in self.writers:
            write(step, metrics)

    def progress(self, step: int, text: str) -> None:
        """One line: step, rate, time left, and `text`. On a terminal it overwrites itself. The rate is that of the last few
        lines, so that compilation at the start is soon forgotten."""
        now = time.monotonic()
        recent = (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.rate = SMOOTHING * recent + (1 - SMOOTHING) * (self.rate or recent)
        self.last_step, self.last_time = step, now
        left = (self.steps - step) / self.rate if self.rate else 0.0
        line = f"step {step}/{self.steps}  {self.rate:.2f} steps/s  {_clock(left)} left  {text}"
        width = os.get_terminal_size(sys.stderr.fileno()).columns if self.is_terminal else 0
        end = "\r" if self.is_terminal and step < self.steps else "\n"
        print(line[: width - 1].ljust(width - 1) if width else line, end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.is_terminal:
            print("\033[2K", end="", file=sys.stderr)
        print(text, file=sys.stderr, flush=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, oldest first; one that a crash cut short is left out.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a run that `vlmoe train` wrote")
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); mend it or move it away") from None


def _drop_later_lines(path: Path, first_step: int) -> None:
    if path.is_file():
        kept = [line for line in read_metrics(path.parent) if line["step"] <= first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _tensorboard(run: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard: true needs TensorBoard: pip install 'vlmoe[tensorboard]'") from None
    writer = SummaryWriter(str(run / "tensorboard"))

    def write(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _wandb(config: RunConfig):
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("wandb_project needs W&B: pip install 'vlmoe[wandb]'") from None
    run = wandb.init(project=config.wandb_project, dir=config.out, id=Path(config.out).name, resume="allow")

    def write(step: int, metrics: dict[str, float]) -> None:
        run.log(metrics, step=step)

    return write
