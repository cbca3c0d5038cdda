"""Tables in docs/benchmarks: CSV files that only grow, and the ratios in them."""

import csv
import fcntl
import statistics
from collections.abc import Iterable, Mapping
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


def median_ratio(figures: Iterable[float], others: Iterable[float]) -> float:
    """Of two ways that were measured in the same repeats: the median of the ratios within each."""
    return statistics.median(one / other for one, other in zip(figures, others, strict=True))
