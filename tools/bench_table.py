"""Tables in docs/benchmarks: CSV files that only grow."""

import csv
import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """SystemExit: the file has other columns than the keys of `row`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several runs may append to one table
        file.seek(0)
        header = next(csv.reader(file), None)
        writer = csv.DictWriter(file, fieldnames=list(row))
        if header is None:
            writer.writeheader()
        elif header != list(row):
            raise SystemExit(f"{path} has other columns than are written now; move it away, or set --out")
        writer.writerow(row)
