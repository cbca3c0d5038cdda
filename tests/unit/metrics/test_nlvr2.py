import pytest

from vlmoe.errors import UserError
from vlmoe.metrics import nlvr2_scores, read_nlvr2_predictions

EXAMPLES = [
    {"identifier": "dev-850-0-0", "label": "True"},
    {"identifier": "dev-850-1-0", "label": "False"},  # the same sentence on another pair of images
    {"identifier": "dev-850-0-1", "label": "False"},  # another sentence
    {"identifier": "dev-850-1-1", "label": "False"},
]


def test_accuracy_and_consistency() -> None:
    lines = ["dev-850-0-0,True\n", "dev-850-1-0,false\n", "dev-850-0-1,True\n", "dev-850-1-1,False\n", "\n"]
    assert nlvr2_scores(EXAMPLES, read_nlvr2_predictions(lines)) == {"accuracy": 75.0, "consistency": 50.0}


def test_predictions_may_be_bools() -> None:
    predictions = {example["identifier"]: example["label"] == "True" for example in EXAMPLES}
    assert nlvr2_scores(EXAMPLES, predictions) == {"accuracy": 100.0, "consistency": 100.0}


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="dev-850-0-0 has no prediction"):
        nlvr2_scores(EXAMPLES, {})
    with pytest.raises(UserError, match="'dev-850' is not split-set-pair-sentence"):
        nlvr2_scores([{"identifier": "dev-850", "label": "True"}], {"dev-850": True})
    with pytest.raises(UserError, match="line 1"):
        read_nlvr2_predictions(["dev-850-0-0 True"])
