"""NLVR2 (Suhr et al. 2019): accuracy and consistency, as `nlvr2/eval/metrics.py` of lil-lab/nlvr computes them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmoe.errors import UserError


def nlvr2_scores(examples: Sequence[Mapping[str, Any]], predictions: Mapping[str, str | bool]) -> dict[str, float]:
    """{"accuracy", "consistency"} in percent; consistency is the share of sentences that are right on all their images.

    `examples` are lines of the official JSON ({"identifier": "dev-850-0-0", "label": "True", ...}), `predictions` is
    {identifier: "True" or "False", or a bool}. An identifier is split-set-pair-sentence: the pairs of a sentence differ
    in the third part alone. Raises UserError for a missing prediction, or an identifier of another form.
    """
    if not examples:
        raise UserError("there is no NLVR2 example to score: pass the lines of the official file")
    right: list[bool] = []
    consistent: dict[tuple[str, ...], bool] = {}
    for example in examples:
        identifier = example["identifier"]
        if identifier not in predictions:
            raise UserError(f"NLVR2 example {identifier} has no prediction: predict every example")
        is_right = str(predictions[identifier]).lower() == str(example["label"]).lower()
        parts = identifier.split("-")
        if len(parts) < 4:
            raise UserError(f"NLVR2 identifier {identifier!r} is not split-set-pair-sentence, such as dev-850-0-0")
        key = (*parts[:2], *parts[3:])
        consistent[key] = consistent.get(key, True) and is_right
        right.append(is_right)
    return {
        "accuracy": 100 * sum(right) / len(right),
        "consistency": 100 * sum(consistent.values()) / len(consistent),
    }


def read_nlvr2_predictions(lines: Iterable[str]) -> dict[str, str]:
    """The official predictions file, a line `identifier,True` or `identifier,False` for each example."""
    predictions: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if line := line.strip():
            identifier, _, label = line.partition(",")
            if label.strip().lower() not in ("true", "false"):
                raise UserError(
                    f"line {number} of the NLVR2 predictions is {line!r}: write `identifier,True` or `,False`"
                )
            predictions[identifier] = label.strip()
    return predictions
