"""A trained run, ready to use."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vlmoe.config import ClassificationConfig, RunConfig, VQAConfig, load
from vlmoe.errors import UserError
from vlmoe.models.weights import latest_checkpoint, load_weights
from vlmoe.tasks.labels import LABELS_FILE
from vlmoe.tasks.registry import make_task
from vlmoe.tasks.start import TOKENIZER_FILE, read_beside
from vlmoe.tasks.task import Task


@dataclass(frozen=True)
class LoadedRun:
    config: RunConfig
    task: Task
    model: nn.Module  # in evaluation mode
    folder: Path  # of the checkpoint


def load_run(run: Path, device: torch.device, overrides: list[str]) -> LoadedRun:
    """The newest checkpoint of a run folder, or the checkpoint of a checkpoint folder.

    Raises:
        UserError: there is none, or it is damaged or does not fit its recipe or its tokenizer.
    """
    folder = latest_checkpoint(run)
    config = load(folder / "recipe.yaml", overrides)
    if isinstance(config, (VQAConfig, ClassificationConfig)) and (folder / LABELS_FILE).is_file():
        config.labels = str(folder / LABELS_FILE)
    task = make_task(config, device)
    if read_beside(folder, TOKENIZER_FILE) not in (None, task.files.get(TOKENIZER_FILE)):
        model = config.data.text.model
        raise UserError(f"{folder} was trained with another tokenizer than {model}; set data.text.model to its")
    model = task.build_model()
    load_weights(folder, model)
    return LoadedRun(config, task, model.to(device).eval(), folder)
