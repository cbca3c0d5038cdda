"""The table of fine-tunings: which files another split has, what majority and chance give, and what the page shows."""

import finetune_page
import finetune_table
import pytest

from vlmoe.config import ExamplesSource
from vlmoe.data.readers import Example
from vlmoe.errors import UserError


def question(key: int, kind: str, answer: str) -> Example:
    meta = {"question_type": kind, "answer_type": "other", "answers": [answer] * 10, "multiple_choice_answer": answer}
    return Example(key, ("a.jpg",), f"row {key}", ("?",), meta)


def test_another_split_is_named_by_replacing_val():
    source = ExamplesSource(
        index="interval/vqa/questions_val.json",
        format="vqa",
        images="pairs-val-*.tar",
        image_name="scenes_val_{image_id}.jpg",
    )
    found = finetune_table.as_split(source, "test_style")
    assert found["index"] == "interval/vqa/questions_test_style.json"
    assert found["images"] == "pairs-test_style-*.tar" and found["image_name"] == "scenes_test_style_{image_id}.jpg"
    assert ExamplesSource(**found).format == "vqa"


def test_majority_is_the_commonest_answer_to_each_type():
    trained = [
        question(1, "color", "red"),
        question(2, "color", "red"),
        question(3, "color", "blue"),
        question(4, "count", "2"),
    ]
    asked = [
        question(5, "color", "red"),
        question(6, "color", "blue"),
        question(7, "count", "2"),
        question(8, "count", "2"),
    ]
    found = finetune_table.majority(trained, asked)
    assert found == {"accuracy": 75.0, "accuracy/question_type/color": 50.0, "accuracy/question_type/count": 100.0}


def test_chance_of_a_text_by_counting():
    """Two pictures with two texts each: the first of four drawn is right every second time, one of ten always."""
    examples = [Example(key, ("a.jpg",), "", ("one", "two"), {}) for key in (1, 2)]
    found = finetune_table._chance_of_texts(examples)
    assert found[1] == pytest.approx(50.0) and found[5] == found[10] == 100.0


def test_the_page_has_the_newest_run_of_each_start_and_says_what_earlier_ones_had(tmp_path):
    table = tmp_path / "finetune.csv"
    rows = [
        {"task": "vqa", "start": start, "steps": steps, "train_seconds": 1, "split": split, "metric": metric, "value": value}
        for start, steps, split, metric, value in [
            ("pretrained", 8, "val", "accuracy", 10.0), ("pretrained", 8, "test", "accuracy", 11.0),
            ("pretrained", 9, "val", "accuracy", 55.04), ("blind", 9, "val", "accuracy", 30.0),
            ("majority", "", "val", "accuracy", 25.0), ("pretrained", 9, "val", "accuracy/question_type/color", 61.0),
            ("pretrained, loss=bce", 9, "val", "accuracy", 44.0),
        ]
    ]  # fmt: skip
    finetune_table.append(table, rows, "60 scenes")
    text = finetune_page.section(table)
    assert "| VQA accuracy | held-out scenes (val) | 55.0 |  | 30.0 | 25.0 |  |" in text
    assert "| color | held-out scenes (val) | 61.0 |" in text and "vqa pretrained 9 (60 scenes)" in text
    assert "- VQA accuracy, pretrained, 8 steps, 60 scenes: 10.0 on val, 11.0 on test" in text
    assert "(test) |" not in text  # the newest run was not scored on it
    assert "- VQA accuracy, pretrained, loss=bce, 9 steps, 60 scenes: 44.0 on val" in text
    table.write_text(table.read_text().replace("55.04", "many"))
    with pytest.raises(SystemExit, match=r"finetune.csv: .*many"):
        finetune_page.section(table)


def test_the_table_says_which_scenes_were_trained_on(tmp_path):
    (tmp_path / "manifest.json").write_text('{"scenes": {"train": 9}, "layout": {"restyled": 0.5}}')
    said = [f"data.examples.sources=[{{format: vqa, index: {tmp_path}/vqa/questions_train.json}}]"]
    assert finetune_table.scenes_of(said) == "9 scenes, 0.5 restyled"
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"data/scenes\.py"):
        finetune_table.scenes_of(said)
