"""VQAv2: the official accuracy, the answer vocabulary and the soft targets (Goyal et al. 2017, GT-Vision-Lab/VQA).

The official evaluator (`vqaEval.py`, last changed in 2021) has quirks that move scores. They are kept, and named where
they happen: a leaderboard figure and ours are the same figure.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from vlmoe.errors import UserError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Meant to spare the point of "5." too, but its look-behind is a look-ahead: only a digit that follows spares a point.
_POINT = re.compile(r"\.(?!\d)")
_MOST_POINTS = 32  # a regex flag was passed where `re.sub` expects a count
_SCORE_OF_COUNT = (0.0, 0.3, 0.6, 0.9, 1.0)
# Mended where one apostrophe is missing. The official table has "Im" and the like too, but words come in lower case.
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_MENDED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, char in enumerate(word) if char == "'"
}
_MENDED["somebody'd"] = "somebodyd"  # the one entry of the official table that goes the other way


def vqa_accuracy(
    annotations: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], *, decimals: int = 4
) -> dict[str, Any]:
    """Accuracy in percent, as the official evaluator computes it.

    `annotations` is the official annotations file: {"annotations": [{"question_id", "question_type", "answer_type",
    "answers": [{"answer", "answer_confidence", "answer_id"}, ...], ...}, ...]}. `predictions` is a results file:
    [{"question_id", "answer"}, ...], one for every question.

    Returns {"overall": float, "per_question_type": {type: float}, "per_answer_type": {type: float},
    "per_question": {question_id: float}}, each rounded to `decimals` (2 on the leaderboard).
    Raises UserError for a prediction that is missing, given twice, or of an unknown question.
    """
    predicted = _answers_by_question(annotations, predictions)
    per_question: dict[Any, float] = {}
    by_question_type, by_answer_type = defaultdict(list), defaultdict(list)
    for question in annotations["annotations"]:
        accuracy = _question_accuracy(question["answers"], predicted[question["question_id"]])
        per_question[question["question_id"]] = accuracy
        by_question_type[question["question_type"]].append(accuracy)
        by_answer_type[question["answer_type"]].append(accuracy)

    def percent(accuracies: Iterable[float]) -> float:
        values = list(accuracies)
        return round(100 * sum(values) / len(values), decimals)

    return {
        "overall": percent(per_question.values()),
        "per_question_type": {name: percent(values) for name, values in by_question_type.items()},
        "per_answer_type": {name: percent(values) for name, values in by_answer_type.items()},
        "per_question": {question_id: percent([value]) for question_id, value in per_question.items()},
    }


@lru_cache(maxsize=2**16)  # ten annotators mostly agree, and few answers are common
def normalize_answer(answer: str) -> str:
    """An answer as the vocabulary of ViLT and BEiT-3 spells it: the evaluator's rules, and no comma at all."""
    return _normalize_words(_normalize_punctuation(answer)).replace(",", "")


def build_answer_vocabulary(annotation_files: Iterable[Mapping[str, Any]], min_count: int = 9) -> list[str]:
    """Normalised `multiple_choice_answer`s that occur at least `min_count` times; the label of an answer is its index.

    `annotation_files` are official annotations files, training before validation: answers are ordered by first
    appearance, and the released BEiT-3 heads (3129 answers) expect just that order.
    """
    counts = Counter(
        normalize_answer(question["multiple_choice_answer"])
        for annotations in annotation_files
        for question in annotations["annotations"]
    )
    return [answer for answer, count in counts.items() if count >= min_count]


def soft_targets(answers: Sequence[str | Mapping[str, Any]]) -> dict[str, float]:
    """{normalised answer: score} of the ten answers to a question: 0.3, 0.6, 0.9 or 1 for 1, 2, 3, or 4 and more annotators.

    `answers` are strings, or the official {"answer": ...}. The score is the mean of the official accuracy over the
    annotators. BEiT-3 looked up raw answers in a vocabulary of normalised ones, and lost those that differ.
    """
    counts = Counter(normalize_answer(answer if isinstance(answer, str) else answer["answer"]) for answer in answers)
    return {answer: _SCORE_OF_COUNT[min(count, 4)] for answer, count in counts.items()}


def _answers_by_question(annotations: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    predicted: dict[Any, str] = {}
    for prediction in predictions:
        if prediction["question_id"] in predicted:
            raise UserError(f"question {prediction['question_id']} is predicted twice: keep one answer a question")
        if not isinstance(prediction["answer"], str):
            raise UserError(f"the answer to question {prediction['question_id']} is no string: put it in quotes")
        predicted[prediction["question_id"]] = prediction["answer"]
    questions = [question["question_id"] for question in annotations["annotations"]]
    if not questions:
        raise UserError("the annotations hold no question: pass the official annotations file")
    missing = [question for question in questions if question not in predicted]
    if missing:
        raise UserError(f"question {missing[0]} has no prediction ({len(missing)} have none): predict every question")
    known = set(questions)
    if unknown := [question for question in predicted if question not in known]:
        raise UserError(f"question {unknown[0]} is predicted but not annotated: is this the file of another split?")
    return predicted


def _question_accuracy(answers: Sequence[Mapping[str, Any]], prediction: str) -> float:
    """Mean over the annotators of min(1, how many of the others said it / 3)."""
    answers = [{**answer, "answer": _strip(answer["answer"])} for answer in answers]
    prediction = _strip(prediction)
    if len({answer["answer"] for answer in answers}) > 1:  # unanimous answers are compared as they are
        answers = [{**answer, "answer": _normalize(answer["answer"])} for answer in answers]
        prediction = _normalize(prediction)
    scores = []
    for answer in answers:
        others = [other for other in answers if other != answer]  # told apart by their answer_id
        scores.append(min(1.0, sum(other["answer"] == prediction for other in others) / 3))
    return sum(scores) / len(scores)


def _strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _normalize(answer: str) -> str:
    return _normalize_words(_normalize_punctuation(answer))


def _normalize_punctuation(answer: str) -> str:
    """A mark goes if it stands beside a space anywhere, or a number has a comma anywhere; else it becomes a space."""
    has_number_with_comma = _COMMA_IN_NUMBER.search(answer) is not None
    normalized = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        normalized = normalized.replace(mark, "" if beside_space or has_number_with_comma else " ")
    return _POINT.sub("", normalized, count=_MOST_POINTS)


def _normalize_words(answer: str) -> str:
    words = (_NUMBER_WORDS.get(word, word) for word in answer.lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)
