"""Label sets: they come from the data, and travel with the checkpoints as a file with a label a line."""

from pathlib import Path

from vlmoe.errors import UserError

LABELS_FILE = "labels.txt"


def read_labels(path: str) -> list[str]:
    """The label of a line is its number, counted from 0.

    Raises:
        UserError: the file is missing, empty, or names a label twice.
    """
    try:
        labels = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"labels: {path} cannot be read ({error}); name a file with a label a line") from None
    if labels == [""]:
        raise UserError(f"labels: {path} is empty; name a file with a label a line")
    seen: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if label in seen:
            raise UserError(f"{path}:{number}: label {label!r} stands in line {seen[label]} already")
        seen[label] = number
    return labels


def labels_text(labels: list[str]) -> str:
    """The content of a labels file."""
    return "".join(f"{label}\n" for label in labels)
