"""The scene builder, on a bank of a few coloured shapes: what it says is true, balanced, and read by official tools."""

import contextlib
import io
import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import scenes as builder
from PIL import Image, ImageColor
from pycocotools.coco import COCO
from scene_kinds import SPLITS, is_new, pair_held_out
from scene_layout import LayoutOptions, draw_scene, generator, overlap
from scene_make import samples_of
from scene_questions import questions
from scene_sprites import color_name
from scene_stats import SplitStats, question_only_floors
from scene_truth import Truth, Words, counts, statement_holds
from small_bank import KINDS
from webdataset.compat import WebDataset

from vlmoe.errors import UserError

SYNONYMS = {"plane": "airplane", "aubergine": "eggplant", "hatchet": "axe"}
DISPUTED = {"tomato", "eggplant"}
LAYOUT = LayoutOptions(image_size=96)
OPTIONS = "--train 70 --val 12 --test 4 --pairs 8 --texts 50 --image-size 96 --shard-size 40"


def test_plain_backgrounds_are_white(world):
    options = LayoutOptions(image_size=96, max_objects=3, plain=True)
    sample = next(iter(samples_of(world, "scenes", "train", range(1), 0, options)))
    picture = Image.open(io.BytesIO(sample.files["jpg"]))
    assert all(min(picture.getpixel(corner)) > 240 for corner in ((0, 0), (95, 0), (0, 95), (95, 95)))
    assert sample.record["background"] == "plain"


@pytest.fixture(scope="module")
def words() -> Words:
    forms = {name: (name, False) for name in KINDS} | {entry[0]: (name, True) for name, entry in KINDS.items()}
    for word, name in SYNONYMS.items():
        forms |= {word: (name, False), word + "s": (name, True)}
    heads = {"animal-": "animal", "animal-bird": "bird", "transport-": "vehicle", "musical": "musical instrument"}
    heads |= {"food-fruit": "fruit", "food-vegetable": "vegetable"}
    families = {
        name: {family for head, family in heads.items() if subgroup.startswith(head) and name not in DISPUTED}
        for name, (_, subgroup, _) in KINDS.items()
    }
    return Words(forms, families)


@pytest.fixture(scope="module")
def made(world) -> dict[str, list[dict]]:
    """Records of scenes, and under `pairs ...` of pairs, of every split."""
    found = {split: samples_of(world, "scenes", split, range(40), 0, LAYOUT) for split in SPLITS}
    found |= {f"pairs {split}": samples_of(world, "pairs", split, range(28), 0, LAYOUT) for split in SPLITS}
    return {name: [sample.record for sample in samples] for name, samples in found.items()}


@pytest.fixture(scope="module")
def out(bank_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "out"
    options = [*OPTIONS.split(), "--workers", "2"]
    builder.main(["--bank", str(bank_folder), "--out", str(folder), "--sheet", str(folder) + ".png", *options])
    return folder


def test_every_caption_and_answer_is_true(world, words):
    said = Counter()
    for split in SPLITS:
        for sample in samples_of(world, "scenes", split, range(100, 250), 0, LAYOUT):
            record = sample.record
            truth = Truth(words, record["objects"], record["width"])
            assert len(record["captions"]) == len(set(record["captions"])) == 5
            for caption in record["captions"]:
                truth.check_caption(caption)
            for question in record["questions"]:
                assert truth.answer(question["question"]) == question["answer"], question
                assert question["answers"] == [question["answer"]] * 10
                said[question["question_type"]] += 1
            here = {thing["name"] for thing in record["objects"]}
            disputed = [q for q in record["questions"] if q["question_type"] in ("which", "count_family")]
            if here & DISPUTED:
                assert not any("fruit" in q["question"] or "vegetable" in q["question"] for q in disputed)
    assert len(said) == 12 and min(said.values()) > 10


def test_statements_of_some_types_alone(world):
    options = LayoutOptions(image_size=96, statements=("each", "total"))
    said = [sample.record["statement_type"] for sample in samples_of(world, "pairs", "train", range(16), 0, options)]
    assert said == (["each"] * 4 + ["total"] * 4) * 2


def test_every_statement_is_what_its_label_says(made, words):
    for split in SPLITS:
        by_set: dict[str, list[dict]] = defaultdict(list)
        for record in made[f"pairs {split}"]:
            left, right = (counts(record[side]["objects"]) for side in ("left", "right"))
            assert str(statement_holds(record["sentence"], left, right, words)) == record["label"], record
            name, number, _, _ = record["identifier"].split("-")
            assert name == split
            by_set[number].append(record)
        for records in by_set.values():  # balanced within each sentence, so for every type too
            assert len({record["sentence"] for record in records}) == 1
            assert [record["label"] for record in records].count("True") == 2
        assert len({record["statement_type"] for record in made[f"pairs {split}"]}) == 7


def test_splits_share_no_style_concept_combination_or_layout(made, world):
    def pictures(split):
        return made[split] + [record[side] for record in made[f"pairs {split}"] for side in ("left", "right")]

    kinds = world.vocabulary.kinds
    layouts, photographs = Counter(), defaultdict(set)
    for split in SPLITS:
        for record in pictures(split):
            things = record["objects"]
            names = {thing["name"] for thing in things}
            assert {thing["style"] == "openmoji" for thing in things} == {split == "test_style"}
            held_out = any(pair_held_out(kinds[a], kinds[b]) for a in names for b in names if a < b)
            assert held_out is (split == "test_combination"), names
            assert split == "test_concept" or not any(map(is_new, names))
            layouts[json.dumps(sorted((thing["name"], *thing["box"]) for thing in things))] += 1
            if record["background"].startswith("photograph"):
                photographs[record["background"]].add(split)
        assert split != "test_concept" or all(any(is_new(t["name"]) for t in r["objects"]) for r in made[split])
    assert max(layouts.values()) == 1
    assert photographs and all(len(splits) == 1 for splits in photographs.values())


def test_layouts_are_legible(world):
    options = LayoutOptions(image_size=96, min_objects=7)
    for index in range(60):
        things = draw_scene(world, "train", index, generator(1, "scene", "train", index), options).things
        assert len(things) == 7
        for number, thing in enumerate(things):
            left, top, width, height = thing.box
            assert max(width, height) >= 22 and min(left, top) >= 1 and max(left + width, top + height) <= 95
            assert all(overlap(thing.box, other.box) <= options.max_overlap for other in things[:number])


def test_the_question_alone_says_little(world):
    def ask(split, number):
        stats = SplitStats()
        for index in range(number):
            rng = generator(0, "scene", split, index)
            found = [vars(q) for q in questions(world, draw_scene(world, split, index, rng, LAYOUT), rng)]
            stats.add_scene({"captions": [], "objects": [], "licence": "MIT", "questions": found})
        return stats

    train, val = ask("train", 1500), ask("val", 500)
    floors = question_only_floors(train, val)
    assert floors["all"]["by_question"] < 0.45
    assert floors["count_all"]["by_question"] < 0.35 and floors["count"]["by_question"] < 0.45
    for name in ("exists", "relation", "compare", "equal", "size"):
        answers, chance = train.by_type[name], 1.5 / train.by_type[name].total() ** 0.5  # three standard errors
        assert abs(answers["yes"] / answers.total() - 0.5) < 0.02 + chance, (name, answers)


def test_floors_by_hand():
    def stats(*found):
        filled = SplitStats()
        asked = [{"question": q, "question_type": "t", "answer": a} for q, a in found]
        filled.add_scene({"captions": [], "objects": [], "licence": "", "questions": asked})
        return filled

    train = stats(("p", "1"), ("p", "1"), ("q", "2"), ("q", "2"), ("q", "2"))
    floors = question_only_floors(train, stats(("p", "1"), ("q", "2"), ("new", "2"), ("q", "1")))
    assert floors["t"] == {"by_question": 0.75, "by_type": 0.5, "questions": 4} == floors["all"]
    parts = stats(("p", "1"), ("p", "1"))
    parts.add(stats(("q", "2"), ("q", "2"), ("q", "2")))
    assert parts.by_question == train.by_question and parts.by_type == train.by_type
    assert parts.counts == train.counts + Counter(scenes=1) and parts.type_of == train.type_of


@pytest.mark.parametrize("color", ["red", "yellow", "green", "blue", "gray", "black", "white", "brown"])
def test_clear_colors_have_names(color):
    picture = Image.new("RGBA", (40, 40), "saddlebrown" if color == "brown" else color)
    assert color_name(picture) == color
    picture.paste(ImageColor.getrgb("purple" if color == "blue" else "blue"), (0, 0, 40, 20))
    assert color_name(picture) is None


def test_output_does_not_depend_on_the_number_of_processes(bank_folder, out, tmp_path):
    options = [*OPTIONS.split(), "--workers", "1"]
    builder.main(["--bank", str(bank_folder), "--out", str(tmp_path / "one"), *options])
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    for name in files - {Path("stats.json")}:  # which holds scenes a second
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_official_readers_load_the_indexes(out):
    with contextlib.redirect_stdout(io.StringIO()):
        boxes, captions = COCO(out / "coco/instances_train.json"), COCO(out / "coco/captions_train.json")
    assert len(boxes.imgs) == len(captions.imgs) == 70 and len(captions.anns) == 350
    number, image = next(iter(boxes.imgs.items()))
    assert Image.open(out / "images/train" / image["file_name"]).size == (96, 96)
    found = boxes.loadAnns(boxes.getAnnIds(imgIds=number))
    assert all(boxes.annToMask(box).sum() == box["area"] for box in found)
    asked, said = (json.loads((out / f"vqa/{name}_val.json").read_text()) for name in ("questions", "annotations"))
    ids = [question["question_id"] for question in asked["questions"]]
    assert ids == [answer["question_id"] for answer in said["annotations"]] and len(set(ids)) == len(ids)
    assert all(len(answer["answers"]) == 10 for answer in said["annotations"])
    assert "agree" in said["info"]["answers"]
    lines = [json.loads(line) for line in (out / "nlvr2/val.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert all((out / "images/val" / line[f"{side}_image"]).is_file() for line in lines for side in ("left", "right"))


def test_shards_load_in_webdataset(out):
    def read(pattern):
        return list(WebDataset(sorted(map(str, out.glob(pattern))), shardshuffle=False))

    scenes, pairs, texts = read("train-*.tar"), read("pairs-train-*.tar"), read("texts-train-*.tar")
    assert [len(scenes), len(pairs), len(texts)] == [70, 8, 50] and len(list(out.glob("train-*.tar"))) == 2
    record = json.loads(scenes[0]["json"])
    assert record["licence"] in ("MIT", "Apache-2.0", "Apache-2.0 AND MIT") and record["split"] == "train"
    [(language, names)] = record["captions_other"].items()
    assert language in ("xx", "ja") and names
    assert {"left.jpg", "right.jpg", "json"} <= set(pairs[0])
    assert all(text["txt"].decode() for text in texts)
    assert (out / "credits.md").read_text() and Path(str(out) + ".png").is_file()


def test_mistakes_are_one_line(bank_folder, tmp_path):
    with pytest.raises(UserError, match="--image-size 32: give a number from 96"):
        builder.main(["--bank", str(bank_folder), "--out", str(tmp_path / "x"), "--image-size", "32"])
    with pytest.raises(UserError, match="--texts -1: give a number from 0"):
        builder.main(["--bank", str(bank_folder), "--out", str(tmp_path / "x"), "--texts", "-1"])
    with pytest.raises(UserError, match="no picture bank"):
        builder.main(["--bank", str(tmp_path), "--out", str(tmp_path / "x")])


def end_this_process(chunk):
    os._exit(1)


def test_a_process_that_is_ended_ends_the_script(bank_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_make", end_this_process)
    with pytest.raises(UserError, match="use fewer --workers"):
        builder.main(["--bank", str(bank_folder), "--out", str(tmp_path / "x"), *OPTIONS.split(), "--workers", "2"])
    assert not (tmp_path / "x").exists()
