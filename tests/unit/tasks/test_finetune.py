"""Fine-tunings: they learn, score every example once, and their checkpoints need nothing but themselves."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from convert_checkpoint import to_project
from safetensors.torch import load_file

from vlmoe.__main__ import main
from vlmoe.config import load
from vlmoe.errors import UserError
from vlmoe.metrics import vqa_accuracy
from vlmoe.models import resize_positions
from vlmoe.models.weights import latest_checkpoint, read_tensors
from vlmoe.tasks import load_run, make_task
from vlmoe.tasks.check import check_data
from vlmoe.tasks.labels import read_labels
from vlmoe.tasks.vqa import LOSSES
from vlmoe.train.tracker import read_metrics
from vlmoe.train.trainer import evaluate, train

CPU = torch.device("cpu")


def weights(run):
    return read_tensors(latest_checkpoint(run) / "model.safetensors")


@pytest.fixture(scope="module")
def pretrained(pretrain_recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("pretrained")
    train(load(pretrain_recipe, [f"out={run}", "steps=2"]))
    return run


@pytest.fixture
def trained_vqa(finetune_recipe, tmp_path):
    train(load(finetune_recipe("vqa", "vqa", steps=4, min_answer_count=1)))
    return tmp_path / "run"


@pytest.mark.parametrize("training", [True, False])
def test_the_blind_baseline_sees_grey(finetune_recipe, training):
    task = make_task(load(finetune_recipe("vqa", "vqa", min_answer_count=1), ["blind=true"]), CPU)
    for sample in (task.training.place(0).load(), task.training.place(1).load()):
        pixels = task.prepare(sample, "examples", np.random.default_rng(0), training)["image"]
        assert pixels.dtype == torch.uint8 and set(pixels.flatten().tolist()) == {127}


def test_losses_of_answers_are_what_they_are_called():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.3, 0.0]], dtype=torch.float64)
    yes, no = logits.sigmoid().log(), (-logits).sigmoid().log()
    assert torch.isclose(LOSSES["bce"](logits, targets), -(targets * yes + (1 - targets) * no).sum())
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    slow = -(log_probs[0, 0] * 1.0 + log_probs[0, 1] * 0.6) / 1.6 - log_probs[1, 1]
    assert torch.isclose(LOSSES["cross_entropy"](logits, targets), slow)


@pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
def test_vqa_has_either_loss(finetune_recipe, tmp_path, loss):
    train(load(finetune_recipe("vqa", "vqa", steps=2, log_every=1, min_answer_count=1), [f"loss={loss}"]))
    first = next(iter(read_metrics(tmp_path / "run")))
    task = make_task(load(finetune_recipe("vqa", "vqa", min_answer_count=1)), CPU)
    guessing = {"bce": math.log(2) * len(task.labels), "cross_entropy": math.log(len(task.labels))}
    assert first["train/answers"] == pytest.approx(guessing[loss], rel=0.2)


def test_vqa_learns_to_look(finetune_recipe, tmp_path, tiny_examples):
    recipe = finetune_recipe("vqa", "vqa", steps=400, eval_every=400, log_every=400, min_answer_count=1)
    easy = ["model.patch_size=16", "data.examples.batch_size=32", "optim.lr=1e-3", "optim.warmup_steps=30"]
    metrics = train(load(recipe, easy)).metrics
    assert metrics["accuracy/question_type/ink"] > 60  # the most frequent answer: 38
    run = tmp_path / "run"
    written = json.loads((run / "metrics.json").read_text())
    assert written == {"checkpoint": "step-00000400", "metrics": metrics}
    official = json.loads((tiny_examples.folder / "vqa/annotations_val.json").read_text())
    results = json.loads((run / "vqa_results.json").read_text())
    assert vqa_accuracy(official, results)["overall"] == metrics["accuracy"]
    assert evaluate(run, []) == metrics


@pytest.mark.parametrize(
    ("task", "format", "figure", "file"),
    [
        ("vqa", "jsonl", "accuracy", "vqa_results.json"),
        ("nlvr2", "nlvr2", "consistency", "nlvr2_results.csv"),
        ("classification", "jsonl", "accuracy", "classification_results.jsonl"),
        ("classification", "instances", "accuracy", "classification_results.jsonl"),
        ("captioning", "coco", "cider", "captions.json"),
        ("classification", "folders", "accuracy", "classification_results.jsonl"),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_equal(finetune_recipe, tmp_path, task, format, figure, file):
    recipe = finetune_recipe(task, format)
    whole = train(load(recipe, ["eval_every=6"])).metrics
    for stop in (["stop_at=2"], ["data.workers=1"]):
        again = train(load(recipe, [f"out={tmp_path / 'again'}", "eval_every=6", *stop])).metrics
    assert again == whole and 0 <= whole[figure] <= 100
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one, other = ((tmp_path / run / file).read_text() for run in ("run", "again"))
    assert one == other and len(one)


def test_accumulation_changes_nothing_but_memory(finetune_recipe, tmp_path):
    dense = ["model.ffn.kind=dense", "steps=3"]
    for name, accumulate in (("whole", 1), ("split", 4)):
        train(load(finetune_recipe("vqa", "vqa"), [*dense, f"out={tmp_path / name}", f"optim.accumulate={accumulate}"]))
    whole, split = ([line["train/loss"] for line in read_metrics(tmp_path / name)[:3]] for name in ("whole", "split"))
    assert whole == pytest.approx(split, rel=1e-4)


def test_two_ranks_score_as_one_process_does(trained_vqa):
    alone = evaluate(trained_vqa, [])
    results = (trained_vqa / "vqa_results.json").read_text()
    (trained_vqa / "vqa_results.json").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "vlmoe"]
    batch = "data.examples.batch_size=14"  # 7 of 32 questions a rank and batch: nothing divides evenly
    subprocess.run(
        [*command, "evaluate", str(trained_vqa), batch],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert json.loads((trained_vqa / "metrics.json").read_text())["metrics"] == alone
    assert (trained_vqa / "vqa_results.json").read_text() == results


def test_the_encoder_starts_from_a_run_at_another_size(finetune_recipe, pretrained):
    recipe = finetune_recipe("nlvr2", "nlvr2", init=str(pretrained))
    for size in (32, 48):
        config = load(recipe, [f"model.image_size={size}", "model.max_text_length=12"])
        task = make_task(config, CPU)
        model = task.build_model()
        task.start(model)
        saved, own = weights(pretrained), model.state_dict()
        for name in (name for name in own if name.startswith("encoder.")):
            expected = saved[name]
            if name == "encoder.vision_embed.positions":
                expected = resize_positions(expected, size // 8)
            if name == "encoder.text_embed.positions":
                expected = expected[: 2 + 12]
            assert torch.equal(own[name], expected), name


def test_pairs_of_pictures_start_from_a_run_of_questions_which_has_no_last_norm(finetune_recipe, trained_vqa):
    task = make_task(load(finetune_recipe("nlvr2", "nlvr2", init=str(trained_vqa))), CPU)
    model = task.build_model()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task.start(model)
    saved = weights(trained_vqa)
    for name, tensor in model.encoder.state_dict(prefix="encoder.").items():
        expected = fresh if name.startswith("encoder.norm.") else saved
        assert torch.equal(tensor, expected[name]), name


def test_a_pretraining_goes_on_from_a_contrastive_run(finetune_recipe, pretrain_recipe, tmp_path):
    train(load(finetune_recipe("retrieval", "coco", steps=2)))
    task = make_task(load(pretrain_recipe, [f"init={tmp_path / 'run'}"]), CPU)
    model = task.build_model()
    task.start(model)
    saved = weights(tmp_path / "run")
    assert all(torch.equal(each, saved[name]) for name, each in model.encoder.state_dict(prefix="encoder.").items())
    assert f"starting from {tmp_path / 'run'}" in task.describe(model)
    with pytest.raises(UserError, match=r"init: .* holds another encoder: model.depth is 2 there and 3 here"):
        train(load(pretrain_recipe, [f"init={tmp_path / 'run'}", "model.depth=3", f"out={tmp_path / 'other'}"]))


def test_a_released_encoder_is_a_start_at_another_size(finetune_recipe, tiny_examples, tmp_path):
    golden = load_file(Path(__file__).parents[2] / "data" / "golden" / "beit3_encoder.safetensors")
    torch.save({"model": {key: each for key, each in golden.items() if key.startswith("beit3.")}}, tmp_path / "a.pth")
    to_project(tmp_path / "a.pth", tmp_path / "start", tokenizer=Path(tiny_examples.spm), attn_heads=4)
    model = asdict(load(tmp_path / "start" / "recipe.yaml").model)
    model |= {"image_size": 2 * model["image_size"], "max_text_length": 16}
    for task, format in (("vqa", "vqa"), ("nlvr2", "nlvr2"), ("classification", "jsonl")):
        recipe = finetune_recipe(task, format, model=model, init=str(tmp_path / "start"), steps=2)
        out = f"out={tmp_path / task}"
        assert train(load(recipe, [out, "eval_every=2", "optim.lr=0", "optim.min_lr=0"])).metrics
        name = "encoder.layers.1.ffn.ffn.text.fc1.weight"
        assert torch.equal(weights(tmp_path / task)[name], golden["beit3.encoder.layers.1.ffn.B.fc1.weight"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dim=64", "holds another encoder: model.dim is 32 there and 64 here"),
        ("model.ffn.kind=dense", "holds another encoder: model.ffn"),
        ("model.max_text_length=20", "has positions for 16 tokens"),
        ("data.text={tokenizer: clip, model: null}", "was trained with tokenizer sentencepiece"),
        ("init=nowhere", "nowhere has no checkpoint"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(finetune_recipe, pretrained, override, message):
    with pytest.raises(UserError) as caught:
        train(load(finetune_recipe("nlvr2", "nlvr2", init=str(pretrained)), [override]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_tokenizer_at_the_same_path_is_noticed(finetune_recipe, pretrained, tiny_world, tmp_path):
    recipe = finetune_recipe("retrieval", "coco", init=str(pretrained))
    model = shutil.copy(tiny_world.spm, tmp_path / "copy.model")
    train(load(recipe, [f"data.text.model={model}", "steps=2"]))  # another path, the same ids
    with model.open("ab") as file:
        file.write(b"\xc0\x0c\x01")  # field 200, which no reader knows: another file that can be read
    for use in (evaluate, load_run):
        with pytest.raises(UserError, match=r"trained with another tokenizer than .*copy.model"):
            use(tmp_path / "run", *([[]] if use is evaluate else [CPU, []]))
    with pytest.raises(UserError, match=r"init: .* was trained with another tokenizer than .*copy.model"):
        train(load(recipe, [f"data.text.model={model}", f"out={tmp_path / 'other'}"]))
    with pytest.raises(UserError, match=r"tokenizer.txt is not what the data of the recipe gives now"):
        train(load(recipe, [f"data.text.model={model}", "steps=2"]))


def test_labels_that_are_gone_are_missed_and_a_digest_is_not(finetune_recipe, trained_vqa):
    recipe, folder = finetune_recipe("vqa", "vqa", steps=4, min_answer_count=1), latest_checkpoint(trained_vqa)
    (folder / "tokenizer.txt").unlink()
    assert train(load(recipe)).step == 4
    (folder / "labels.txt").unlink()
    with pytest.raises(UserError, match=r"labels.txt is not what the data of the recipe gives now"):
        train(load(recipe))


def test_answers_of_a_jsonl_may_be_spelled_freely(trained_vqa, tiny_examples, tmp_path):
    """Unanimous answers of official files are compared to the letter."""
    rows = [json.loads(line) for line in (tiny_examples.folder / "val.jsonl").read_text().splitlines()]
    evaluate(trained_vqa, [])
    answers = {
        each["question_id"]: each["answer"] for each in json.loads((trained_vqa / "vqa_results.json").read_text())
    }
    said = next(iter(answers.values()))
    (tmp_path / "a.jsonl").write_text(json.dumps({**rows[0], "answer": f"The {said.capitalize()}"}) + "\n")
    source = {"index": f"{tmp_path}/a.jsonl", "images": f"{tiny_examples.folder}/images"}
    metrics = evaluate(trained_vqa, [f"data.examples.eval_sources=[{yaml.safe_dump(source, default_flow_style=True)}]"])
    given = json.loads((trained_vqa / "vqa_results.json").read_text())[0]["answer"]
    assert metrics["questions_with_a_known_answer"] == 1 and metrics["accuracy"] == (100 if given == said else 0)


def test_a_run_no_longer_needs_what_it_started_from(finetune_recipe, pretrained, tiny_examples, tmp_path):
    shutil.copytree(pretrained, tmp_path / "start")
    train(load(finetune_recipe("vqa", "vqa", init=str(tmp_path / "start"), min_answer_count=1)))
    shutil.rmtree(tmp_path / "start")
    gone = [f"data.examples.sources=[{{index: {tmp_path}/gone.json}}]"]
    loaded = load_run(tmp_path / "run", CPU, gone)
    assert sorted(loaded.task.labels) == sorted(["red", "green", "blue", "yellow", "square", "disc", "bar"])
    assert evaluate(tmp_path / "run", gone)["questions"] == 32


def test_frozen_routers_stay_and_the_rest_moves(finetune_recipe, pretrained, tmp_path):
    recipe = finetune_recipe("vqa", "vqa", init=str(pretrained), freeze_routers=True)
    train(load(recipe))
    before, after = weights(pretrained), weights(tmp_path / "run")
    routers = [name for name in after if ".router." in name]
    assert routers and all(torch.equal(before[name], after[name]) for name in routers)
    moved = [name for name in after if name in before and not torch.equal(before[name], after[name])]
    assert any("experts.w_in" in name for name in moved)
    losses = [line["train/load_balancing"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert all(loss >= 0.99 for loss in losses)  # counted all the same


def test_a_question_without_a_known_answer_counts_as_wrong(trained_vqa, tiny_examples, tmp_path):
    rows = [json.loads(line) for line in (tiny_examples.folder / "val.jsonl").read_text().splitlines()]
    known = {**rows[0], "answer": "disc"}
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [known, {**rows[1], "answer": "moon"}]))
    source = {"index": f"{tmp_path}/a.jsonl", "images": f"{tiny_examples.folder}/images"}
    metrics = evaluate(trained_vqa, [f"data.examples.eval_sources=[{yaml.safe_dump(source, default_flow_style=True)}]"])
    assert (metrics["questions"], metrics["questions_with_a_known_answer"]) == (2, 1)
    answers = json.loads((trained_vqa / "vqa_results.json").read_text())
    assert metrics["accuracy"] == (50 if answers[0]["answer"] == "disc" else 0)


def test_an_evaluation_leaves_nothing_out(trained_vqa, tiny_examples, tmp_path):
    shutil.copytree(tiny_examples.folder / "images", tmp_path / "images")
    source = {**tiny_examples.source("vqa", "val"), "images": str(tmp_path / "images")}
    override = f"data.examples.eval_sources=[{json.dumps(source)}]"
    (tmp_path / "images" / "0070.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"2 of 32 held-out examples could not be read, first id 700; .*check-data"):
        evaluate(trained_vqa, [override])
    with pytest.raises(UserError, match=r"questions_val.json: questions\[12\]"):
        evaluate(trained_vqa, [override])
    (tmp_path / "images" / "0070.png").unlink()
    with pytest.raises(UserError, match=r"there is no picture '0070.png'"):
        evaluate(trained_vqa, [override])


@pytest.mark.parametrize(
    ("task", "format", "file", "key"),
    [
        ("vqa", "jsonl", "val.jsonl", "answer"),
        ("classification", "jsonl", "val.jsonl", "label"),
        ("nlvr2", "nlvr2", "nlvr2/val.jsonl", "label"),
        ("captioning", "jsonl", "val.jsonl", "text"),
    ],
)
def test_a_held_out_row_without_its_answer_is_named(finetune_recipe, tiny_examples, tmp_path, task, format, file, key):
    rows = (tiny_examples.folder / file).read_text().splitlines()
    rows[2] = json.dumps({name: value for name, value in json.loads(rows[2]).items() if name != key})
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = {**tiny_examples.source(format, "val"), "index": f"{tmp_path}/a.jsonl"}
    config = load(finetune_recipe(task, format), [f"data.examples.eval_sources=[{json.dumps(source)}]"])
    with pytest.raises(UserError, match=r"a.jsonl:3: there is nothing to score this by"):
        train(config)


def test_training_stops_before_it_starts_where_pictures_are_missing(finetune_recipe, tiny_examples, tmp_path):
    shutil.copytree(tiny_examples.folder / "images", tmp_path / "images")
    for number in (3, 5):
        (tmp_path / "images" / f"000{number}.png").unlink()
    source = json.dumps([{**tiny_examples.source("coco", "train"), "images": f"{tmp_path}/images"}])
    recipe, sources = finetune_recipe("captioning", "coco", steps=1), f"data.examples.sources={source}"
    with pytest.raises(UserError, match=r"images\[3\]: there is no picture '0003.png' in .* \(2 are missing\)"):
        train(load(recipe, [sources]))
    train(load(recipe, [sources, "data.max_bad_fraction=0.1"]))


def test_a_test_set_without_answers_gives_predictions_and_no_figure(trained_vqa, tiny_examples):
    source = {**tiny_examples.source("vqa", "val"), "annotations": None}
    assert evaluate(trained_vqa, [f"data.examples.eval_sources=[{json.dumps(source)}]"]) == {"questions": 32}
    assert len(json.loads((trained_vqa / "vqa_results.json").read_text())) == 32


def test_check_data_says_what_there_is_and_what_is_odd(finetune_recipe, tiny_examples):
    lines = list(check_data(load(finetune_recipe("vqa", "vqa", min_answer_count=1))))
    assert lines == ["training: 128 examples with 64 pictures", "held out: 32 examples with 16 pictures", "7 answers"]
    lines = list(check_data(load(finetune_recipe("vqa", "vqa", min_answer_count=20))))
    assert "training questions have no answer of the vocabulary and are left out, first" in lines[3]
    assert "held-out questions have no answer of the vocabulary and are counted as wrong, first" in lines[4]
    both = json.dumps([tiny_examples.source("vqa", "train")])
    lines = list(check_data(load(finetune_recipe("vqa", "vqa"), [f"data.examples.eval_sources={both}"])))
    assert any(line.startswith("note: 64 held-out pictures are trained on too") for line in lines)


def test_check_data_is_a_command(finetune_recipe, capsys):
    recipe = str(finetune_recipe("nlvr2", "nlvr2"))
    assert main(["check-data", recipe]) == 0
    assert "held out: 16 examples with 16 pictures" in capsys.readouterr().out
    assert main(["check-data", recipe, "data.examples.eval_sources=[{format: nlvr2, index: no.jsonl}]"]) == 2
    assert "no.jsonl does not exist" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_labels(finetune_recipe, tiny_examples, tmp_path):
    shutil.copy(tiny_examples.folder / "train.jsonl", tmp_path / "own.jsonl")
    source = json.dumps([{"index": f"{tmp_path}/own.jsonl", "images": f"{tiny_examples.folder}/images"}])
    recipe, own = finetune_recipe("classification", "jsonl"), f"data.examples.sources={source}"
    train(load(recipe, [own, "stop_at=2"]))
    (tmp_path / "own.jsonl").write_text((tmp_path / "own.jsonl").read_text().replace('"disc"', '"ball"'))
    with pytest.raises(UserError, match=r"labels.txt is not what the data of the recipe gives now; set another `out`"):
        train(load(recipe, [own]))


@pytest.mark.parametrize("label", ["a\nb", ""])
def test_a_label_that_is_no_line_is_named(finetune_recipe, tiny_examples, tmp_path, label):
    rows = (tiny_examples.folder / "train.jsonl").read_text().splitlines()
    rows[2] = json.dumps({**json.loads(rows[2]), "label": label})
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = json.dumps([{"index": f"{tmp_path}/a.jsonl", "images": f"{tiny_examples.folder}/images"}])
    with pytest.raises(UserError, match=r"a.jsonl:3: label .* is no line of text"):
        train(load(finetune_recipe("classification", "jsonl"), [f"data.examples.sources={source}"]))


def test_a_file_of_labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert read_labels(str(path)) == ["cat", "dog"]
    for content, message in {"": "is empty", "a\nb\na\n": ":3: label 'a' stands in line 1 already"}.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_labels(str(path))


def test_an_unknown_label_is_named(finetune_recipe, tiny_examples, tmp_path):
    rows = (tiny_examples.folder / "val.jsonl").read_text().splitlines()
    rows[2] = json.dumps({**json.loads(rows[2]), "label": "moon"})
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    source = json.dumps([{"index": f"{tmp_path}/a.jsonl", "images": f"{tiny_examples.folder}/images"}])
    config = load(finetune_recipe("classification", "jsonl"), [f"data.examples.eval_sources={source}"])
    with pytest.raises(UserError, match=r"a.jsonl:3: label 'moon' is not among the 3 labels"):
        list(check_data(config))


@pytest.mark.parametrize(
    ("task", "format", "message"),
    [
        ("vqa", "coco", "task vqa needs 'answers', this example has none"),
        ("nlvr2", "vqa", "task nlvr2 wants 2 picture(s), this example has 1"),
        ("classification", "coco", "task classification needs 'label', this example has none"),
        ("vqa", "folders", "task vqa needs a text, this example has none"),
    ],
)
def test_data_of_another_task_is_refused(finetune_recipe, task, format, message):
    with pytest.raises(UserError) as caught:
        train(load(finetune_recipe(task, format)))
    assert message in str(caught.value)
