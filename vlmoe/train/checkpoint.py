"""Checkpoints: a folder of safetensors and JSON per step, written beside its place and renamed into it.

    checkpoints/step-00000500/model.safetensors        parameters and buffers
                              optimizer.safetensors    `<key>.<parameter name>`: Adam moments and step counts
                              state.json               step, counters of broken samples, versions
                              recipe.yaml              the resolved recipe
                              ...                      what else the task needs to be rebuilt, such as its labels

Nothing in it is executed on loading. The random numbers and the data position of a step are pure functions of
(seed, step), so the step number is all of their state.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmoe.errors import UserError
from vlmoe.models.weights import checkpoint_folder, checkpoint_steps, load_weights, read_tensors


def save(
    run: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    files: dict[str, str],
) -> Path:
    """Write the checkpoint of `step` and return its folder. A failed write leaves every older checkpoint as it was.

    `files` are the recipe and whatever else the task names, by file name.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    folder = checkpoint_folder(run, step)
    partial = folder.with_name(f".{folder.name}.partial")
    with clear_disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file(_owned(model.state_dict()), partial / "model.safetensors")
            save_file(_owned(_optimizer_tensors(optimizer)), partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
            for name, content in files.items():
                (partial / name).write_text(content, encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                _flush_to_disk(path)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            _flush_to_disk(folder.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill `model` (and `optimizer`) from a checkpoint folder; returns its state.json.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not fit the model.
    """
    load_weights(folder, model)
    if optimizer is not None:
        _fill_optimizer(optimizer, read_tensors(folder / "optimizer.safetensors"))
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict) or not {"step", "bad_samples"} <= state.keys():
            raise ValueError("step or bad_samples is not there")
        return state
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'state.json'} is missing or damaged ({error}); delete {folder}") from None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for step in checkpoint_steps(run)[:-keep]:
        shutil.rmtree(checkpoint_folder(run, step))


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into one line that says how much room there is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(place).free / 2**20
        raise UserError(
            f"cannot write {path} ({error}); {free:.0f} MiB are free there: make room or choose another `out`, "
            f"then run the same command again (older checkpoints are intact)"
        ) from None


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors wants contiguous tensors that share no memory."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def _fill_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    numbers = {name: i for i, name in enumerate(name for group in optimizer.param_groups for name in group["names"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key_and_name, value in saved.items():
        key, name = key_and_name.split(".", 1)
        if name not in numbers:
            raise UserError(f"the saved optimiser state has {name!r}, which this recipe's model does not train")
        state.setdefault(numbers[name], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
