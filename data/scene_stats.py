"""Figures of a set of scenes: what there is of what, and how far the question alone leads."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from scene_make import Record

Answers = defaultdict[str, Counter[str]]


class SplitStats:
    """Counts over the samples of one split, filled as they come."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.objects: Counter[int] = Counter()
        self.licences: set[str] = set()
        self.by_question: Answers = defaultdict(Counter)  # wording -> answers
        self.by_type: Answers = defaultdict(Counter)  # question type -> answers
        self.type_of: dict[str, str] = {}  # wording -> question type
        self.labels: Answers = defaultdict(Counter)  # statement type -> labels

    def add_scene(self, record: Record) -> None:
        self.counts.update(scenes=1, captions=len(record["captions"]), questions=len(record["questions"]))
        self.counts["boxes"] += len(record["objects"])
        self.objects[len(record["objects"])] += 1
        self.licences.update(record["licence"].split(" AND "))
        for question in record["questions"]:
            self.by_question[question["question"]][question["answer"]] += 1
            self.by_type[question["question_type"]][question["answer"]] += 1
            self.type_of[question["question"]] = question["question_type"]

    def add_pair(self, record: Record) -> None:
        self.counts["pairs"] += 1
        self.labels[record["statement_type"]][record["label"]] += 1
        for side in ("left", "right"):
            self.licences.update(record[side]["licence"].split(" AND "))

    def add(self, other: "SplitStats") -> None:
        """What another one has counted."""
        self.counts.update(other.counts)
        self.objects.update(other.objects)
        self.licences |= other.licences
        self.type_of |= other.type_of
        for own, its in (
            (self.by_question, other.by_question),
            (self.by_type, other.by_type),
            (self.labels, other.labels),
        ):
            for key, answers in its.items():
                own[key].update(answers)

    def summary(self) -> dict[str, Any]:
        return {
            **self.counts,
            "objects_per_scene": dict(sorted(self.objects.items())),
            "answers_by_question_type": {
                name: dict(answers.most_common(12)) for name, answers in sorted(self.by_type.items())
            },
            "true_share_by_statement_type": {
                name: round(labels["True"] / labels.total(), 4) for name, labels in sorted(self.labels.items())
            },
        }


def question_only_floors(train: SplitStats, test: SplitStats) -> dict[str, dict[str, float]]:
    """By question type and over all: accuracy on `test` of answers that look at no picture.

    `by_question`: the wording's most frequent answer in `train`, or its type's where the wording is new. `by_type`: the
    type's most frequent answer in `train`. `questions`: how many there are.
    """

    def by_type(question: str) -> str:
        return _most_frequent(train.by_type, test.type_of[question])

    def by_question(question: str) -> str:
        return _most_frequent(train.by_question, question) if question in train.by_question else by_type(question)

    floors = {
        name: _accuracy(test, by_question, by_type, lambda question, name=name: test.type_of[question] == name)
        for name in sorted(test.by_type)
    }
    return floors | {"all": _accuracy(test, by_question, by_type, lambda question: True)}


def _most_frequent(answers: Answers, key: str) -> str:
    return max(answers[key].items(), key=lambda item: (item[1], item[0]), default=("", 0))[0]


def _accuracy(
    test: SplitStats,
    by_question: Callable[[str], str],
    by_type: Callable[[str], str],
    counts: Callable[[str], bool],
) -> dict[str, float]:
    asked = {question: answers for question, answers in test.by_question.items() if counts(question)}
    total = sum(answers.total() for answers in asked.values())
    right = sum(answers[by_question(question)] for question, answers in asked.items())
    majority = sum(answers[by_type(question)] for question, answers in asked.items())
    return {"by_question": round(right / total, 4), "by_type": round(majority / total, 4), "questions": total}


def table(floors: Mapping[str, Mapping[str, float]]) -> str:
    """The floors in columns."""
    lines = [f"{'question type':<14} {'questions':>9}  {'best answer per wording':>23}  {'per type':>8}"]
    lines += [
        f"{name:<14} {int(row['questions']):>9}  {row['by_question']:>23.3f}  {row['by_type']:>8.3f}"
        for name, row in floors.items()
    ]
    return "\n".join(lines)
