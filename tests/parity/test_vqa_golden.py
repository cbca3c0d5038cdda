"""VQA accuracy against the official evaluator, on answers that its normalisation treats in every odd way."""

import json
from pathlib import Path

import pytest

from vlmoe.metrics import vqa_accuracy

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_official_figures() -> None:
    golden = json.loads((GOLDEN / "vqa_accuracy.json").read_text(encoding="utf-8"))
    questions = [
        {**case, "answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(case["answers"], start=1)]}
        for case in golden["cases"]
    ]
    predictions = [{"question_id": case["question_id"], "answer": case["prediction"]} for case in golden["cases"]]
    scores = vqa_accuracy({"annotations": questions}, predictions, decimals=golden["n_decimals"])
    assert scores["overall"] == pytest.approx(golden["overall"], abs=1e-6)
    assert scores["per_question_type"] == pytest.approx(golden["perQuestionType"], abs=1e-6)
    assert scores["per_answer_type"] == pytest.approx(golden["perAnswerType"], abs=1e-6)
    expected = {case["question_id"]: case["accuracy"] for case in golden["cases"]}
    assert scores["per_question"] == pytest.approx(expected, abs=1e-6)
