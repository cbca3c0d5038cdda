"""The one training loop. A task says what is learned; this file says how.

The randomness of step s is a pure function of (seed, s): the batch (data/loader.py) and, through one reseeding per step,
everything the model draws (drop path, codebook restarts). A run that stopped at any step therefore goes on bit-equal.
"""

import itertools
import json
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmoe import __version__
from vlmoe.config import RunConfig, differences, load, to_yaml
from vlmoe.data import BadSample, BadSampleCounter, Batch, EvalLoader, build_eval_loader, build_loader
from vlmoe.errors import UserError
from vlmoe.models.build import compile_blocks
from vlmoe.models.weights import checkpoint_folder, checkpoint_steps, latest_checkpoint
from vlmoe.tasks import Task, load_run, make_task
from vlmoe.tasks.start import DIGESTS, read_beside
from vlmoe.train import checkpoint, parallel
from vlmoe.train.checkpoint import clear_disk_errors
from vlmoe.train.graphs import GraphedUpdate, Update
from vlmoe.train.hardware import autocast, check_experts, describe_hardware
from vlmoe.train.memory import keep_freed_memory
from vlmoe.train.optim import learning_rate, make_optimizer, set_learning_rate
from vlmoe.train.tracker import Tracker

# What may differ between a run and its continuation: it changes no number that the run computes.
FREE_TO_CHANGE = {
    "out", "stop_at", "device", "cuda_graphs", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "tensorboard",
    "wandb_project", "data.workers", "data.max_bad_fraction",
}  # fmt: skip
NAMED = 20  # broken samples of each cause that the log names; all are counted
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    step: int
    was_interrupted: bool  # by a signal, before the last step
    metrics: dict[str, float]  # of the last evaluation; empty when there was none


def train(config: RunConfig) -> Outcome:
    """Train from the beginning, or go on from the newest checkpoint in `config.out`.

    Raises:
        UserError: anything the user can mend; checkpoints written before stay as they are.
    """
    ranks = parallel.join(config.device)
    try:
        return _train(config, ranks)
    finally:
        parallel.leave()


def evaluate(run: Path, overrides: list[str]) -> dict[str, float]:
    """Score the newest checkpoint of a run on the held-out samples of its recipe; writes `metrics.json` into `run`, and
    the predictions beside it."""
    config = load(latest_checkpoint(run) / "recipe.yaml", overrides)
    ranks = parallel.join(config.device)
    try:
        check_experts(config, ranks.device)
        loaded = load_run(run, ranks.device, overrides)
        held_out = _open_held_out(loaded.config, loaded.task, ranks)
        figures = _evaluate(
            loaded.config, loaded.task, loaded.model, held_out, ranks, run=run, checkpoint=loaded.folder.name
        )
        if not figures:
            raise UserError(f"{run}: nothing is held out; set data.examples.eval_sources, or eval_shards of a stream")
        return figures
    finally:
        parallel.leave()


def _train(config: RunConfig, ranks: parallel.Ranks) -> Outcome:
    run = Path(config.out)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    task = make_task(config, ranks.device)
    check_experts(config, ranks.device)
    model = task.build_model().to(ranks.device)
    if not checkpoint_steps(run):
        task.start(model)
    parallel.broadcast_model(model)
    optimizer = make_optimizer(model, config.optim)
    bad = BadSampleCounter(config.data.max_bad_fraction)
    first = _resume(config, run, task, model, optimizer, bad)
    if not ranks.is_main:  # the first rank goes on with the counts of all
        bad = BadSampleCounter(config.data.max_bad_fraction)
    if config.compile:
        compile_blocks(model)
    streams, held_out = task.open_streams(), _open_held_out(config, task, ranks)
    tracker = Tracker(config, first) if ranks.is_main else None
    if tracker:
        tracker.say(task.describe(model))
        hardware = describe_hardware(config, ranks.device, ranks.world_size)
        begin = f"going on from step {first}" if first else "starting"
        tracker.say(f"{run}: {'complete' if first == config.steps else begin} on {hardware}")
    last = min(config.steps, config.stop_at or config.steps)
    batches = build_loader(
        streams, task.prepare, seed=config.seed, first_step=first, num_steps=last,
        accumulate=config.optim.accumulate, rank=ranks.rank, world_size=ranks.world_size, workers=config.data.workers,
        device=ranks.device, pad_id=task.pad_id, max_text_length=task.max_text_length, count=task.num_targets,
    )  # fmt: skip
    update = _make_update(config, task, model, optimizer, ranks)
    metrics: dict[str, float] = {}
    health = _Health(config, first)
    with _stop_signals() as stop:
        for step, micro_batches in enumerate(batches, start=first + 1):
            started = time.monotonic()
            for batch in micro_batches:
                _name(batch.bad, bad.causes)
                bad.add(batch.bad, seen=batch.seen)
            _prepare_step(config, model, optimizer, step, ranks)
            found = update(micro_batches, _num_targets(micro_batches, ranks.device))
            is_last = step == last or parallel.on_any_rank(stop.is_set())
            at_log, at_eval = step % config.log_every == 0, step % config.eval_every == 0 or step == config.steps
            at_save = step % config.checkpoint_every == 0 or is_last
            health.watch(found, step, look=at_log or at_eval or at_save or ranks.device.type == "cpu")
            bad_anywhere = _on_all_ranks(bad) if at_log or at_save else bad
            if tracker and (at_log or is_last):
                figures = {f"train/{name}": float(value) for name, value in found.items()}
                figures |= {"train/lr": learning_rate(step - 1, config.steps, config.optim)}
                figures |= {"train/seconds": time.monotonic() - started}
                figures |= {f"bad_samples/{cause}": float(count) for cause, count in bad_anywhere.causes.items()}
                tracker.log(step, figures)
                tracker.progress(step, f"loss {float(found['loss']):.4f}")
            if at_eval:
                checkpoint_name = checkpoint_folder(run, step).name
                metrics = _evaluate(config, task, model, held_out, ranks, run=run, checkpoint=checkpoint_name)
                if tracker:
                    tracker.log(step, {f"eval/{name}": value for name, value in metrics.items()})
            if at_save and ranks.is_main:
                state = {
                    "bad_samples": bad_anywhere.state_dict(),
                    "versions": {"vlmoe": __version__, "torch": torch.__version__},
                }
                checkpoint.save(
                    run, step=step, model=model, optimizer=optimizer, state=state,
                    files={**task.files, "recipe.yaml": to_yaml(config)},
                )  # fmt: skip
                checkpoint.prune(run, config.keep_checkpoints)
            if is_last:
                first = step
                break
    if tracker and first < config.steps:
        tracker.say(f"stopped after step {first} of {config.steps}; the same command goes on from there")
    return Outcome(step=first, was_interrupted=stop.is_set() and first < config.steps, metrics=metrics)


def _prepare_step(
    config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, ranks: parallel.Ranks
) -> None:
    torch.manual_seed(_step_seed(config.seed, step, ranks.rank))
    model.train()
    set_learning_rate(optimizer, learning_rate(step - 1, config.steps, config.optim))


def _make_update(
    config: RunConfig, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: parallel.Ranks
) -> Update:
    """`_update` for this run, recorded where the recipe says so and there is a GPU.

    Raises:
        UserError: cuda_graphs with several ranks.
    """
    update = partial(_update, config, task, model, optimizer, ranks)
    if not getattr(config, "cuda_graphs", False) or ranks.device.type != "cuda":
        return update
    if ranks.world_size > 1:
        raise UserError(f"cuda_graphs is for one GPU, and this run has {ranks.world_size}: set cuda_graphs=false")
    return GraphedUpdate(update, optimizer)


def _update(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: parallel.Ranks,
    micro_batches: list[Batch],
    totals: dict[str, Tensor],
) -> dict[str, Tensor]:
    """One optimiser step; returns the loss, its parts and the gradient norm, summed over micro-batches and ranks."""
    sums: dict[str, Tensor] = {}
    states: list[Any] = []
    for batch in micro_batches:
        with autocast(config, ranks.device):
            loss = task.loss(model, batch.inputs, totals)
        loss.total.backward()
        for name, value in {"loss": loss.total.detach(), **loss.metrics}.items():
            sums[name] = sums.get(name, torch.zeros((), device=ranks.device)) + value
        states.append(loss.state)
    parallel.sum_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    task.after_step(model, states)
    summed = parallel.sum_over_ranks(torch.stack(list(sums.values())))
    return {**dict(zip(sums, summed, strict=True)), "gradient_norm": norm}


def _open_held_out(config: RunConfig, task: Task, ranks: parallel.Ranks) -> list[EvalLoader]:
    """One loader per stream that has held-out samples; every sample once, whatever the number of ranks."""
    return [
        build_eval_loader(
            samples, name, task.prepare, seed=config.seed,
            batch_size=max(1, getattr(config.data, name).batch_size // (ranks.world_size * config.optim.accumulate)),
            rank=ranks.rank, world_size=ranks.world_size, workers=config.data.workers, device=ranks.device,
            pad_id=task.pad_id, max_text_length=task.max_text_length,
        )
        for name, samples in task.open_held_out().items()
    ]  # fmt: skip


@torch.no_grad()
def _evaluate(
    config: RunConfig, task: Task, model: nn.Module, held_out: list[EvalLoader], ranks: parallel.Ranks,
    *, run: Path, checkpoint: str,
) -> dict[str, float]:  # fmt: skip
    """The figures of all held-out samples; rank 0 writes them and the predictions into the folder `run`.

    Raises:
        UserError: too many of them are broken.
    """
    model.eval()
    records: list[dict[str, Any]] = []
    broken: list[BadSample] = []
    seen = 0
    for batch in itertools.chain.from_iterable(held_out):
        _name(batch.bad, Counter(each.cause for each in broken))
        broken += batch.bad
        seen += batch.seen
        if batch.inputs:  # not compiled: these shapes come too seldom to pay, and `evaluate` finds the same figures
            with torch.compiler.set_stance("force_eager"), autocast(config, ranks.device):
                records += task.predict(model, batch.inputs)
    records = parallel.gather_lists(records)
    bad = BadSampleCounter(config.data.max_bad_fraction)
    bad.add(parallel.gather_lists(broken), seen=sum(parallel.gather_lists([seen])))
    if not records:
        return {}
    figures = task.score(records) | {f"bad_samples/{cause}": float(count) for cause, count in bad.causes.items()}
    if ranks.is_main:
        said = json.dumps({"checkpoint": checkpoint, "metrics": figures}, indent=1)
        for name, content in {"metrics.json": said, **task.prediction_files(records)}.items():
            with clear_disk_errors(run / name):
                (run / name).write_text(content, encoding="utf-8")
    return figures


def _resume(
    config: RunConfig, run: Path, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, bad: BadSampleCounter
) -> int:
    """The step that the newest checkpoint of `run` stands at, after filling everything from it; 0 where there is none."""
    steps = checkpoint_steps(run)
    if not steps:
        return 0
    folder = checkpoint_folder(run, steps[-1])
    changed = [line for key, line in differences(load(folder / "recipe.yaml"), config) if key not in FREE_TO_CHANGE]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(f"{run} holds a run of another recipe: {changed[0]}{more}; set another `out`, or delete {run}")
    for name, content in task.files.items():
        kept = read_beside(folder, name)
        if kept != content and not (kept is None and name in DIGESTS):  # a checkpoint may be older than those
            raise UserError(f"{folder / name} is not what the data of the recipe gives now; set another `out`")
    state = checkpoint.load(folder, model, optimizer)
    bad.load_state_dict(state["bad_samples"])
    return int(state["step"])


def _on_all_ranks(bad: BadSampleCounter) -> BadSampleCounter:
    total = BadSampleCounter(bad.max_bad_fraction)
    for state in parallel.gather_lists([bad.state_dict()]):
        total.merge(state)
    return total


def _name(broken: Sequence[BadSample], before: Counter[str]) -> None:
    """Write into the log which samples are broken, until NAMED of a cause are; `before` were counted already."""
    causes = before.copy()
    for each in broken:
        causes[each.cause] += 1
        if causes[each.cause] <= NAMED:
            _log.warning("broken sample: %s key %s (%s)", each.shard, each.key, each.cause)


class _Health:
    """Stops a run whose loss or gradient is no longer a number, before anything of it is saved."""

    def __init__(self, config: RunConfig, first: int) -> None:
        self.run, self.takes_init = Path(config.out), hasattr(config, "init")
        self.is_broken, self.last_look = torch.zeros((), dtype=torch.bool), first

    def watch(self, found: dict[str, Tensor], step: int, look: bool) -> None:
        is_finite = torch.isfinite(found["loss"]) & torch.isfinite(found["gradient_norm"])
        self.is_broken = self.is_broken.to(is_finite.device) | ~is_finite
        if look and self.is_broken:
            kept, go_on = "no checkpoint was written yet", ""
            if saved := checkpoint_steps(self.run):
                good = checkpoint_folder(self.run, saved[-1])
                kept = f"checkpoint {good} is good"
                go_on = f" (init={good} starts from its encoder)" if self.takes_init else ""
            where = (
                f"at step {step}" if self.last_look == step - 1 else f"between steps {self.last_look + 1} and {step}"
            )
            raise UserError(
                f"the loss or its gradient became NaN or infinite {where}; {kept}: lower optim.lr, lengthen "
                f"optim.warmup_steps or lower optim.clip_norm, and set another `out`{go_on}"
            )
        self.last_look = step if look else self.last_look


@contextmanager
def _stop_signals():
    """An event that SIGTERM or Ctrl-C sets: the step in hand is finished and saved. A second one stops at once; where code that
    cannot be interrupted swallows it, a third one ends the process."""
    stop = threading.Event()

    def on_signal(number: int, _: Any) -> None:
        if stop.is_set():
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _num_targets(micro_batches: list[Batch], device: torch.device) -> dict[str, Tensor]:
    """Of the whole step: summed over micro-batches and ranks, in the processor's memory, so that no device is waited for."""
    counts = [batch.num_targets for batch in micro_batches]
    local = torch.tensor([sum(each[name] for each in counts) for name in counts[0]], dtype=torch.float64)
    total = parallel.sum_over_ranks(local).to(device, torch.float32, non_blocking=True)
    return dict(zip(counts[0], total.unbind(), strict=True))
