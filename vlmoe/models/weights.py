"""Finding the checkpoints of a run and reading tensors from them, without executing anything in them."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlmoe.errors import UserError


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill parameters and buffers from a checkpoint folder; they must fit by name and shape.

    Raises:
        UserError: the file is missing or damaged, or names or shapes differ from the model's.
    """
    saved, own = read_tensors(folder / "model.safetensors"), model.state_dict()
    for name in sorted(saved.keys() | own.keys()):
        if name not in saved or name not in own:
            where = "model of this recipe" if name in saved else "checkpoint"
            raise UserError(
                f"{folder} does not fit: the {where} has no tensor {name!r}; use the recipe saved beside it"
            )
        if saved[name].shape != own[name].shape:
            raise UserError(
                f"{folder} does not fit: {name} is {list(saved[name].shape)} there and {list(own[name].shape)} in this "
                f"recipe; use the recipe saved beside it, or another `out`"
            )
    model.load_state_dict(saved)


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the folder of a checkpoint, or of a run that has one")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error}); use another checkpoint") from None


def weights_digest(run: Path) -> str:
    """SHA-256 of the file that holds the newest checkpoint's tensors."""
    with (latest_checkpoint(run) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-" + "[0-9]" * 8))


def latest_checkpoint(run: Path) -> Path:
    """Folder of a run's newest checkpoint, or `run` itself where it is such a folder.

    Raises:
        UserError: there is none.
    """
    if (run / "model.safetensors").is_file():
        return run
    steps = checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint; name the folder of a run (the `out` of its recipe) that has one")
    return checkpoint_folder(run, steps[-1])
