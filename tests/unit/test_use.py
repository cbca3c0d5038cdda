"""Runs as objects: `vlmoe.load`, `vlmoe predict`, and the search index."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlmoe
from vlmoe.__main__ import main
from vlmoe.config import load
from vlmoe.errors import UserError
from vlmoe.search import as_text, contact_sheet, index_folder, index_path
from vlmoe.tasks.captioning import Captioning
from vlmoe.train.trainer import evaluate, train
from vlmoe.use import Model, open_picture


@pytest.fixture
def trained(finetune_recipe, tmp_path) -> Callable[..., Path]:
    """trained("vqa", "vqa") -> the folder of a run of two steps."""

    def run(task: str, format: str, **settings: object) -> Path:
        train(load(finetune_recipe(task, format, steps=2, **settings), ["checkpoint_every=2"]))
        return tmp_path / "run"

    return run


@pytest.fixture
def pictures(tiny_examples) -> list[Path]:
    return [tiny_examples.folder / "images" / f"{number:04}.png" for number in range(64, 80)]


@pytest.mark.parametrize(("loss", "each"), [("cross_entropy", lambda count: 1 / count), ("bce", lambda count: 0.5)])
def test_scores_of_answers_are_what_their_loss_made_of_logits(trained, pictures, loss, each):
    """Those of a model that has learned nothing yet."""
    model = vlmoe.load(trained("vqa", "vqa", min_answer_count=1, loss=loss, optim={"lr": 1e-9}), "cpu")
    answers = model.answer(pictures[0], "a what", top_k=100)
    assert [answer.score for answer in answers] == pytest.approx([each(len(answers))] * len(answers), rel=0.2)


def test_answers_are_those_of_the_evaluation(trained, tiny_examples, pictures):
    run = trained("vqa", "vqa", min_answer_count=1)
    evaluate(run, [])
    official = {row["question_id"]: row["answer"] for row in json.loads((run / "vqa_results.json").read_text())}
    asked = json.loads((tiny_examples.folder / "vqa/questions_val.json").read_text())["questions"]
    model = vlmoe.load(run, "cpu", batch_size=3)
    paths = [tiny_examples.folder / "images" / f"{row['image_id']:04}.png" for row in asked]
    found = model.answer(paths, [row["question"] for row in asked], top_k=2)
    assert [answers[0].text for answers in found] == [official[row["question_id"]] for row in asked]
    assert all(len(answers) == 2 and 1 >= answers[0].score >= answers[1].score >= 0 for answers in found)
    one = model.answer(Image.open(paths[0]), asked[0]["question"], top_k=2)
    assert [answer.text for answer in one] == [answer.text for answer in found[0]]
    assert [answer.score for answer in one] == pytest.approx([answer.score for answer in found[0]], rel=1e-4)
    many = model.answer(pictures[0], ["a what", "a what on a ground"])
    assert len(many) == 2 and many[0][0] == model.answer(pictures[0], "a what")[0]._replace(score=many[0][0].score)
    with pytest.raises(UserError, match="top_k is 0; it must be at least 1"):
        model.answer(pictures[0], "a what", top_k=0)
    with pytest.raises(UserError, match=r"cannot read 'a.x00.png': embedded null byte"):
        model.answer("a\0.png", "a what")
    with pytest.raises(UserError, match="is not valid Unicode; write it in UTF-8"):
        model.answer(pictures[0], "a \udcff")
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        vlmoe.load(run, batch_size=0)
    with pytest.raises(UserError, match="2 pictures do not pair with 3 questions"):
        model.answer(pictures[:2], ["a", "b", "c"])
    with pytest.raises(UserError, match="is a run of task vqa; a run of task captioning writes captions"):
        model.caption(pictures[0])


def test_captions_are_those_of_the_evaluation(trained, pictures):
    run = trained("captioning", "coco")
    evaluate(run, [])
    official = [row["caption"] for row in json.loads((run / "captions.json").read_text())]
    assert vlmoe.load(run, batch_size=5).caption(pictures) == official
    model = vlmoe.load(run, overrides=["beam_size=1"])
    assert isinstance(model.caption(pictures[0]), str)
    assert isinstance(model._task, Captioning) and model._task.config.beam_size == 1


def test_labels_and_sentences(trained, tiny_examples, pictures, tmp_path):
    model = vlmoe.load(trained("nlvr2", "nlvr2"))
    assert isinstance(model.is_true("a disc on a ground", pictures[0], pictures[1]), bool)
    (tmp_path / "run").rename(tmp_path / "nlvr2")
    model = vlmoe.load(trained("classification", "folders"))
    labels = model.classify(pictures[:2], top_k=3)
    assert len(labels) == 2 and sum(label.score for label in labels[0]) == pytest.approx(1)
    assert {label.text for label in labels[0]} == {"square", "disc", "bar"}


def test_embeddings_have_unit_length_and_batches_do_not_matter(trained, pictures):
    model = vlmoe.load(trained("retrieval", "coco"), batch_size=3)
    images, texts = model.embed_image(pictures), model.embed_text(["a red disc", "on blue ground"])
    assert images.shape == (16, 32) and texts.shape == (2, 32) and images.dtype == texts.dtype == torch.float32
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=-1), torch.ones(18))
    torch.testing.assert_close(model.embed_image(pictures[5]), images[5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.embed_text("on blue ground"), texts[1], atol=1e-5, rtol=1e-5)
    assert model.embed_image([]).shape == model.embed_text([]).shape == (0, 32)


def test_an_index_is_saved_and_only_what_changed_is_embedded_again(trained, pictures, tmp_path, monkeypatch):
    run, folder = trained("retrieval", "coco"), tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for number, path in enumerate(pictures):
        (folder / ("below" if number % 2 else ".") / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    (folder / "notes.txt").write_text("not a picture")
    embedded: list[int] = []
    whole = Model.embed_image
    monkeypatch.setattr(Model, "embed_image", lambda self, image: (embedded.append(len(image)), whole(self, image))[1])
    model = vlmoe.load(run, batch_size=8)

    index = index_folder(model, folder)
    assert len(index.names) == 16 and sum(embedded) == 16
    assert len(index.unreadable) == 1 and "broken.png: undecodable image" in index.unreadable[0]
    everything = whole(model, [folder / name for name in index.names])
    torch.testing.assert_close(index.embeddings, everything, atol=1e-5, rtol=1e-5)
    query = model.embed_text("a red disc")
    found = index.search(query, top_k=3)
    assert [score for _, score in found] == pytest.approx((everything @ query).topk(3).values.tolist(), abs=1e-5)

    embedded.clear()
    (folder / index.names[0]).unlink()
    Image.new("RGB", (32, 32), "red").save(folder / index.names[1])
    again = index_folder(vlmoe.load(run), folder)
    assert embedded == [1] and again.names == index.names[1:]
    assert torch.equal(again.embeddings[1:], index.embeddings[2:])
    assert not torch.allclose(again.embeddings[0], index.embeddings[1], atol=1e-4)

    embedded.clear()
    index_path(model, folder).write_bytes(b"damaged")
    assert index_folder(model, folder).names == again.names and sum(embedded) == 15
    embedded.clear()
    os.utime(model.checkpoint / "model.safetensors", (1, 1))  # other weights
    index_folder(model, folder)
    assert sum(embedded) == 15


def test_contact_sheet(pictures):
    sheet = contact_sheet(pictures[:7], columns=5)
    assert sheet.size == (5 * 96, 2 * 96)
    drawn = as_text(sheet, width=20).splitlines()
    assert len(drawn) == 4 and all(line.count("▀") == 20 for line in drawn)


def test_predict_on_the_command_line(trained, pictures, capsys, tmp_path):
    def say(*arguments: object) -> str:
        assert main(["predict", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    run = trained("vqa", "vqa", min_answer_count=1)
    capsys.readouterr()
    said = say(run, "--image", pictures[0], "--image", pictures[1], "--question", "a what", "--top-k", 2)
    assert all(re.fullmatch(r".*\.png: \w+ \(0\.\d\d\), \w+ \(0\.\d\d\)", line) for line in said.splitlines())
    assert said.count("\n") == 2
    for arguments, message in [
        ((run, "--question", "a what"), "name pictures with --image"),
        ((run, "--question", "a what", "--image", "none.png"), "cannot read none.png"),
        ((run, "--caption", "--image", pictures[0]), "a run of task captioning writes captions"),
        ((run, "--search", "a", tmp_path), "a run of task retrieval embeds"),
        ((run, "--caption", "--image", pictures[0], "--device", "gpu"), "device 'gpu' cannot be used here"),
        ((tmp_path, "--caption", "--image", pictures[0]), "has no checkpoint"),
    ]:
        assert main(["predict", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    run.rename(tmp_path / "vqa")
    assert "0064.png: " in say(trained("captioning", "coco"), "--image", pictures[0], "--caption")
    run.rename(tmp_path / "captioning")
    said = say(trained("retrieval", "coco"), "--search", "a red disc", pictures[0].parent, "--top-k", 4)
    assert len(re.findall(r"^-?\d\.\d{3}  .*\.png$", said, re.MULTILINE)) == 4
    assert Image.open(said.strip().splitlines()[-1].removeprefix("contact sheet: ")).size == (4 * 96, 96)


def test_search_takes_every_picture_that_can_be_decoded_and_names_that_are_no_text(trained, pictures, capsys, tmp_path):
    folder = tmp_path / os.fsdecode(b"photos\xff")
    folder.mkdir()
    for name in ("a.gif", "b.BMP", os.fsdecode(b"c\xff.png")):
        Image.open(pictures[0]).save(folder / name)
    assert main(["predict", str(trained("retrieval", "coco")), "--search", "a red disc", str(folder)]) == 0
    said = capsys.readouterr().out
    assert all(f"photos\\udcff/{name}" in said for name in ("a.gif", "b.BMP", "c\\udcff.png"))


def test_a_picture_in_memory_is_treated_like_its_file(tmp_path: Path):
    turned, clear = Image.new("RGB", (20, 40), "red"), Image.new("RGBA", (8, 8), (255, 0, 0, 100))
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    clear.save(tmp_path / "clear.png")
    for name in ("turned.jpg", "clear.png"):
        path = tmp_path / name
        torch.testing.assert_close(open_picture(Image.open(path)), open_picture(path), atol=2, rtol=0)


def test_a_tensor_is_pixels_or_refused():
    assert open_picture(torch.zeros(3, 4, 5, dtype=torch.uint8)).shape == (3, 4, 5)
    for wrong in (torch.zeros(3, 4, 5), torch.zeros(4, 5, 3, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.uint8)):
        with pytest.raises(UserError, match=r"uint8 \[3, height, width\]"):
            open_picture(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend may run there")
def test_a_backend_that_cannot_run_here_is_named(trained):
    with pytest.raises(UserError, match=r"model.ffn: backend 'triton' needs"):
        vlmoe.load(trained("retrieval", "coco"), overrides=["model.ffn.backend=triton"])


def test_importing_the_package_brings_no_torch():
    code = "import sys, vlmoe; assert 'torch' not in sys.modules; vlmoe.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        vlmoe.lode  # noqa: B018
