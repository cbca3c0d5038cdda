"""Index files: every format says the same of the same pictures, wrong rows are named, and the order is a law."""

import json
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vlmoe.config import ExamplesSource
from vlmoe.data import ExampleStream, open_examples
from vlmoe.errors import UserError


def opened(*sources):
    return open_examples([ExamplesSource(**each) for each in sources], recipe_key="data.examples.sources")


def pixels(image):
    return np.asarray(image).tolist()


def test_formats_agree(tiny_examples):
    names = ("vqa", "coco", "karpathy", "jsonl", "nlvr2", "instances")
    read = {name: opened(tiny_examples.source(name, "val")) for name in names}
    assert {name: len(each) for name, each in read.items()} == {
        "vqa": 32, "coco": 16, "karpathy": 16, "jsonl": 16, "nlvr2": 16, "instances": 16,
    }  # fmt: skip
    for number in range(16):
        question, coco, karpathy, row, statement, instance = (
            each.load(number * (2 if name == "vqa" else 1)) for name, each in read.items()
        )
        images = [pixels(each.image) for each in (question, coco, karpathy, row, statement, instance)]
        assert all(image == images[0] for image in images)
        assert coco.texts == karpathy.texts and len(coco.texts) == 2
        assert coco.meta == karpathy.meta == {"image_id": 64 + number, "id": 64 + number}
        assert question.meta["multiple_choice_answer"] in coco.texts[0] and len(question.meta["answers"]) == 10
        assert row.meta["answers"] == [row.meta["label"]] * 10
        assert instance.meta["label"] == row.meta["label"]
        assert pixels(statement.image_b) == pixels(read["coco"].load((number + 1) % 16).image)
        assert statement.meta["label"] in ("True", "False")
    for example in (folders := opened(tiny_examples.source("folders", ""))):
        assert example.meta["label"] == example.images[0].split("/")[0]
    assert len(folders) == 80
    for each in (*read.values(), folders):
        each.check_pictures(decode=True)


def test_official_nlvr2_names(tmp_path):
    rows = [{"identifier": "train-10171-0-0", "sentence": "x", "label": "True", "directory": 7}]
    rows += [{"identifier": "dev-850-0-1", "sentence": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    train, dev = opened({"index": f"{tmp_path}/a.jsonl", "format": "nlvr2"})
    assert train.images == ("7/train-10171-0-img0.png", "7/train-10171-0-img1.png")
    assert dev.images == ("dev-850-0-img0.png", "dev-850-0-img1.png") and "label" not in dev.meta


def test_shards_hold_the_same_pictures_as_a_folder(tiny_examples, tmp_path):
    pictures = sorted((tiny_examples.folder / "images").iterdir())
    for number, part in enumerate((pictures[:50], pictures[50:])):
        with webdataset.TarWriter(f"{tmp_path}/a-{number}.tar") as writer:
            for path in part:
                writer.write({"__key__": f"some/folder/{path.stem}", "png": path.read_bytes()})
    for name in ("vqa", "nlvr2"):
        source = tiny_examples.source(name, "val")
        folder, shards = opened(source), opened({**source, "images": f"{tmp_path}/a-*.tar"})
        shards.check_pictures(decode=True)
        for number in range(len(folder)):
            one, other = folder.load(number), shards.load(number)
            assert pixels(one.image) == pixels(other.image) and one.meta == other.meta
    shutil.copy(f"{tmp_path}/a-1.tar", f"{tmp_path}/b-1.tar")
    with pytest.raises(UserError, match=r"a-1.tar and .*b-1.tar both have '0050'; name only one of them"):
        opened({**tiny_examples.source("vqa", "val"), "images": f"{tmp_path}/*-1.tar"})
    with pytest.raises(UserError, match=r"questions\[0\]: there is no picture '0064.jpg' in .*a-\*\.tar"):
        opened({**tiny_examples.source("vqa", "val"), "images": f"{tmp_path}/a-*.tar", "image_name": "{image_id:04}.jpg"}
        ).check_pictures()  # fmt: skip


def test_parts_are_whole_disjoint_and_independent_of_the_order(tiny_examples, tmp_path):
    source = {**tiny_examples.source("vqa", "train"), "held_out_images": 10}
    rest, held_out = opened({**source, "part": "rest"}), opened({**source, "part": "held_out"})
    assert len(held_out.pictures_of()) == 10 and len(rest) + len(held_out) == 128 == len(list(rest.whole()))
    assert not rest.pictures_of().keys() & held_out.pictures_of().keys()
    content = json.loads((tiny_examples.folder / "vqa/questions_train.json").read_text())
    (tmp_path / "turned.json").write_text(json.dumps({"questions": content["questions"][::-1]}))
    turned = opened({**source, "index": f"{tmp_path}/turned.json", "part": "held_out"})
    assert {each.id for each in turned} == {each.id for each in held_out}


def test_an_example_of_two_pictures_is_in_a_part_only_if_both_are(tiny_examples):
    source = {**tiny_examples.source("nlvr2", "train"), "held_out_images": 32}
    rest, held_out = opened({**source, "part": "rest"}), opened({**source, "part": "held_out"})
    assert not rest.pictures_of().keys() & held_out.pictures_of().keys()
    mixed = len(list(rest.whole())) - len(rest) - len(held_out)
    assert len(held_out.pictures_of()) <= 32 and min(len(rest), len(held_out), mixed) > 0


@pytest.mark.parametrize(
    ("format", "setting", "message"),
    [
        ("jsonl", {"splits": ["train"]}, r"sources\[0\].splits is read by format karpathy alone"),
        ("coco", {"annotations": "a.json"}, r"sources\[0\].annotations is read by format vqa alone"),
        ("karpathy", {"image_name": "{image_id}.jpg"}, r"sources\[0\].image_name is read by format vqa alone"),
        ("jsonl", {"held_out_images": 9}, r"sources\[0\]: held_out_images sets nothing aside in part 'all'"),
        ("jsonl", {"part": "rest"}, r"sources\[0\]: part 'rest' needs held_out_images"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(tiny_examples, format, setting, message):
    with pytest.raises(UserError, match=message):
        opened({**tiny_examples.source(format, "train"), **setting})


def test_two_pictures_of_one_name_are_two(tiny_examples, tmp_path):
    def ids(*places):
        sources = []
        for number, place in enumerate(places):
            index = tmp_path / f"{number}.jsonl"
            index.write_text('{"image": "0001.png"}')
            sources.append({"index": str(index), "images": str(place)})
        return [example.meta["image_id"] for example in opened(*sources)]

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture = str(shutil.copy(tiny_examples.folder / "images" / "0001.png", tmp_path / name))
        with webdataset.TarWriter(f"{tmp_path}/{name}.tar") as writer:
            writer.write({"__key__": "0001", "png": Path(picture).read_bytes()})
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert ids(tmp_path / "a", f"{tmp_path}/b/../a/", tmp_path / "link") == ["0001.png"] * 3
    assert ids(tmp_path / "a", tmp_path / "b") == ["0001.png", picture]
    assert ids(tmp_path / "a.tar", tmp_path / "b.tar", f"{tmp_path}/a*.tar") == [
        "0001.png", f"{tmp_path}/b.tar/0001.png", "0001.png",
    ]  # fmt: skip


ANNOTATIONS = "vqa/annotations_train.json"


def change(name, line, **row):
    """An edit of a file of JSON lines: a row replaced, keys of None removed."""

    def edit(folder):
        lines = (folder / name).read_text().splitlines()
        new = {key: value for key, value in {**json.loads(lines[line]), **row}.items() if value is not None}
        (folder / name).write_text("\n".join([*lines[:line], json.dumps(new), *lines[line + 1 :]]))

    return edit


def test_rows_without_an_id_are_known_by_their_file_and_line(tiny_examples, tmp_path):
    sources = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        shutil.copy(tiny_examples.folder / "val.jsonl", tmp_path / folder)
        sources.append({**tiny_examples.source("jsonl", "val"), "index": str(tmp_path / folder / "val.jsonl")})
    ids = [example.id for example in opened(*sources)]
    assert len(set(ids)) == 32 and ids[0] == str(tmp_path / "one" / "val-1")


def test_a_name_that_is_no_utf8_can_be_held_out(tiny_examples, tmp_path):
    for name in (b"a.png", b"\xff.png"):
        path = os.path.join(os.fsencode(tmp_path), b"disc", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(tiny_examples.folder / "images" / "0001.png", path)
    source = {"format": "folders", "index": str(tmp_path), "held_out_images": 1}
    both = [opened({**source, "part": part}) for part in ("rest", "held_out")]
    assert [len(each) for each in both] == [1, 1]
    for each in both:
        each.check_pictures(decode=True)


def test_folders_hold_every_kind_of_picture_that_can_be_decoded(tiny_examples, tmp_path):
    (tmp_path / "disc").mkdir()
    for name in ("a.png", "b.gif", "c.BMP"):
        Image.open(tiny_examples.folder / "images" / "0001.png").save(tmp_path / "disc" / name)
    examples = opened({"format": "folders", "index": str(tmp_path)})
    assert [each.images[0] for each in examples] == ["disc/a.png", "disc/b.gif", "disc/c.BMP"]
    examples.check_pictures(decode=True)


def change_in(name, rows, number, **row):
    """An edit of a row of a list in a JSON file, keys of None removed; a row more, where `number` is its length."""

    def edit(folder):
        content = json.loads((folder / name).read_text())
        there = content[rows]
        there[number:] = [{**there[min(number, len(there) - 1)], **row}, *there[number + 1 :]]
        there[number] = {key: value for key, value in there[number].items() if value is not None}
        (folder / name).write_text(json.dumps(content))

    return edit


def cut(name, by=9):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


@pytest.mark.parametrize(
    ("format", "edit", "message"),
    [
        ("jsonl", change("train.jsonl", 4, image=None), "train.jsonl:5: 'image' is missing; it must be of type str"),
        ("jsonl", change("train.jsonl", 4, text=[1]), "train.jsonl:5: 'text' must be a string or a list of strings"),
        ("jsonl", change("train.jsonl", 4, answers="red"), "train.jsonl:5: 'answers' must be a string or a list"),
        ("jsonl", lambda f: [change("train.jsonl", n, id="a")(f) for n in (2, 4)], "train.jsonl:5: id 'a' comes twice"),
        ("jsonl", change("train.jsonl", 4, image="no.png"), "train.jsonl:5: there is no picture 'no.png' in"),
        ("jsonl", cut("train.jsonl"), "train.jsonl:64 is not valid JSON"),
        ("jsonl", cut("images/0007.png", by=40), "train.jsonl:8: picture '0007.png' in"),
        ("jsonl", lambda folder: (folder / "train.jsonl").unlink(), "train.jsonl does not exist"),
        ("jsonl", lambda folder: (folder / "train.jsonl").write_text("\n"), "holds no example"),
        ("jsonl", change("train.jsonl", 4, answer=" "), "train.jsonl:5: an answer is blank"),
        ("jsonl", change("train.jsonl", 4, image="a" * 300), "train.jsonl:5: there is no picture"),
        ("jsonl", change("train.jsonl", 4, image="a\0.png"), "train.jsonl:5: there is no picture"),
        ("jsonl", change("train.jsonl", 4, text="a \ud800"), "train.jsonl:5: its text is not valid Unicode"),
        ("jsonl", change("train.jsonl", 4, id=True), "train.jsonl:5: 'id' is True; it must be of type int or str"),
        ("jsonl", lambda f: (f / "train.jsonl").write_text("[" * 99999), "train.jsonl:1 is not valid JSON"),
        ("nlvr2", change("nlvr2/train.jsonl", 2, label="maybe"), "train.jsonl:3: label is 'maybe'"),
        ("nlvr2", change("nlvr2/train.jsonl", 2, left_image=None), "train.jsonl:3: 'left_image' is missing"),
        ("vqa", change_in(ANNOTATIONS, "annotations", 128, question_id=11), "annotations[128]: question 11 is annotated in"),
        ("vqa", change_in(ANNOTATIONS, "annotations", 128, question_id=9), "annotations[128]: question 9 is not in"),
        ("vqa", change_in(ANNOTATIONS, "annotations", 5, image_id=9), "questions[5]: image_id is 2, but 9 in the annotation"),
        ("vqa", change_in(ANNOTATIONS, "annotations", 5, answers=[{"answer": "red"}] * 9), "[5]: it has 9 answers, not 10"),
        ("vqa", change_in(ANNOTATIONS, "annotations", 5, answers=[]), "annotations[5]: it has 0 answers, not 10"),
        ("vqa", change_in(ANNOTATIONS, "annotations", 5, question_type=[1]), "annotations[5]: 'question_type' is [1]"),
        ("instances", change_in("coco/instances_train.json", "annotations", 5, image_id=999), "[5]: image_id 999 is not"),
        ("karpathy", change_in("karpathy.json", "images", 5, imgid=[1]), "images[5]: 'imgid' is [1]; it must be of type"),
        ("karpathy", change_in("karpathy.json", "images", 5, filepath=7), "images[5]: 'filepath' is 7; it must be of type"),
        ("vqa", cut("vqa/questions_train.json"), "questions_train.json is not valid JSON"),
        ("vqa", lambda f: shutil.copy(f / "vqa/annotations_val.json", f / "vqa/annotations_train.json"), "has no annotation"),
        ("coco", lambda f: shutil.copy(f / "karpathy.json", f / "coco/captions_train.json"), "images[0]: 'id' is missing"),
        ("karpathy", lambda f: (f / "karpathy.json").write_text("[]"), 'karpathy.json has no list "images"'),
    ],
)  # fmt: skip
def test_the_first_wrong_row_is_named(tiny_examples, tmp_path, format, edit, message):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_examples.folder, folder)
    edit(folder)
    source = json.loads(
        json.dumps(tiny_examples.source(format, "train")).replace(str(tiny_examples.folder), str(folder))
    )
    with pytest.raises(UserError) as caught:
        opened(source).check_pictures(decode=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_order_is_a_new_permutation_each_epoch(tiny_examples):
    examples = opened(tiny_examples.source("coco", "train"))

    def order(seed, positions):
        stream = ExampleStream(examples, batch_size=8, seed=seed)
        return [stream.locate(position).number for position in positions]

    epochs = [order(0, range(64 * e, 64 * (e + 1))) for e in range(3)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert order(0, range(100, 150)) == list(chain(*epochs))[100:150]
    assert order(1, range(64)) != epochs[0]


def test_a_broken_picture_is_replaced_and_reported(tiny_examples, tmp_path):
    shutil.copytree(tiny_examples.folder / "images", tmp_path / "images")
    (tmp_path / "images" / "0003.png").unlink()
    examples = opened({**tiny_examples.source("coco", "train"), "images": f"{tmp_path}/images"})
    stream = ExampleStream(examples, batch_size=8, seed=0)
    read = [stream.read(position, lambda sample: sample.key) for position in range(64)]
    assert [(bad.cause, bad.key) for _, failures in read for bad in failures] == [("missing image", "3")]
    assert len(read) == 64 and "3" not in {key for key, _ in read}
