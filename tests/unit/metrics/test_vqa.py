import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmoe.errors import UserError
from vlmoe.metrics import build_answer_vocabulary, normalize_answer, soft_targets, vqa_accuracy

said = st.sampled_from(["yes", "Yes.", "no", "two", "2", "a dog", "dog", "can't", "cant", "1,000", "black/white"])


def question(answers: list[str], question_id: int = 1) -> dict:
    return {
        "question_id": question_id,
        "question_type": "what",
        "answer_type": "other",
        "answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers, start=1)],
    }


def accuracy(answers: list[str], prediction: str) -> float:
    scores = vqa_accuracy({"annotations": [question(answers)]}, [{"question_id": 1, "answer": prediction}])
    return scores["overall"]


@given(st.lists(said, min_size=10, max_size=10), said, st.randoms())
def test_order_of_the_ten_answers_changes_nothing(answers: list[str], prediction: str, random) -> None:
    assert accuracy(random.sample(answers, 10), prediction) == accuracy(answers, prediction)


@given(st.lists(said, min_size=10, max_size=10))
def test_soft_targets_are_the_official_accuracy(answers: list[str]) -> None:
    if len(set(answers)) > 1:  # the evaluator compares unanimous answers as they are
        for answer, score in soft_targets(answers).items():
            assert accuracy(answers, answer) == pytest.approx(100 * score)


def test_unanimous_answers_are_not_normalised() -> None:
    assert accuracy(["The dog."] * 10, "dog") == 0
    assert accuracy(["The dog."] * 10, "The dog.\n") == 100
    assert accuracy(["The dog."] * 9 + ["cat"], "dog") == 100


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The  Dog.", "dog"),
        ("None", "0"),
        ("ten", "10"),
        ("dont know", "don't know"),
        ("somebody'd", "somebodyd"),
        ("black/white", "black white"),
        ("red, white", "red white"),
        ("1,000", "1000"),
        ("10.5", "10.5"),
        ("u.s.", "us"),
        ("." * 40, "." * 8),  # no more than 32 points are taken away
    ],
)
def test_normalisation(answer: str, normalised: str) -> None:
    assert normalize_answer(answer) == normalised


def test_vocabulary_keeps_the_order_of_first_appearance() -> None:
    files = [
        {"annotations": [{"multiple_choice_answer": answer} for answer in ["rare", "Two", "cat"] + ["cat", "2"] * 2]},
        {"annotations": [{"multiple_choice_answer": answer} for answer in ["the cat", "dog", "dog", "dog"]]},
    ]
    assert build_answer_vocabulary(files, min_count=3) == ["2", "cat", "dog"]


def test_predictions_must_match_the_questions() -> None:
    annotations = {"annotations": [question(["yes"] * 10, 5)]}
    answer = {"question_id": 5, "answer": "yes"}
    assert vqa_accuracy(annotations, [answer])["per_question"] == {5: 100.0}
    for predictions, message in [
        ([], "question 5 has no prediction"),
        ([answer, answer], "question 5 is predicted twice"),
        ([answer, {"question_id": 6, "answer": "no"}], "question 6 is predicted but not annotated"),
        ([{"question_id": 5, "answer": 2}], "question 5 is no string"),
    ]:
        with pytest.raises(UserError, match=message):
            vqa_accuracy(annotations, predictions)
