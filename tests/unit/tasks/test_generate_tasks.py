"""Captioning and retrieval on the tiny world: they learn, and what they report is exact."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

from vlmoe.config import RunConfig, load, to_yaml
from vlmoe.data import to_float
from vlmoe.data.batch import positions
from vlmoe.errors import UserError
from vlmoe.metrics import recall_at_k
from vlmoe.models.weights import latest_checkpoint, read_tensors
from vlmoe.tasks import load_run, make_task
from vlmoe.tasks.captioning import Captioning, corrupt, hide_words
from vlmoe.tasks.contrast import contrastive_loss
from vlmoe.tasks.retrieval import Retrieval
from vlmoe.train.tracker import read_metrics
from vlmoe.train.trainer import evaluate, train

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def words(tiny_world) -> str:
    """A tokenizer to which a word is a token, so that captions are short."""
    path = tiny_world.folder / "words"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tiny_world.folder / "text.txt"), model_prefix=str(path), model_type="word", vocab_size=80,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return f"{path}.model"


@pytest.fixture
def recipe(finetune_recipe, words) -> Callable[..., RunConfig]:
    """recipe("retrieval", "steps=3") -> its configuration on the tiny world's captions."""

    def make(task: str, *overrides: str) -> RunConfig:
        return load(
            finetune_recipe(task, "coco"), [f"data.text.model={words}", "data.transform.crop_scale=1", *overrides]
        )

    return make


def test_captioning_learns_and_writes_cocos_results(recipe, tmp_path):
    metrics = train(recipe("captioning", "steps=200", "data.examples.batch_size=32")).metrics
    assert metrics["cider"] > 100 and metrics["bleu4"] > 30
    run = tmp_path / "run"
    rows = json.loads((run / "captions.json").read_text())
    assert [row["image_id"] for row in rows] == list(range(64, 80)) and len({row["caption"] for row in rows}) > 5
    assert json.loads((run / "metrics.json").read_text())["metrics"] == pytest.approx(metrics)
    assert evaluate(run, ["data.examples.batch_size=5"]) == pytest.approx(metrics)


def test_retrieval_learns(recipe):
    settings = ("steps=200", "optim.lr=2e-3", "model.ffn.kind=dense", "data.examples.batch_size=32")
    metrics = train(recipe("retrieval", *settings)).metrics
    assert metrics["mean_recall"] > 60  # by chance: 33
    assert metrics["text_to_image/recall@10"] >= metrics["text_to_image/recall@1"]


def test_retrieval_scores_equal_the_naive_matrix(recipe, tmp_path):
    """On different pictures: the scores of equal ones differ in the last bits, by the batches that they came in."""
    config = recipe("retrieval", "steps=1")
    train(config)
    index = json.loads(Path(config.data.examples.eval_sources[0].index).read_text())
    number_of = {each["caption"]: each["image_id"] for each in index["annotations"]}
    for name, key in (("images", "id"), ("annotations", "image_id")):
        index[name] = [each for each in index[name] if each[key] in number_of.values()]
    (tmp_path / "different.json").write_text(json.dumps(index))
    different = f"data.examples.eval_sources[0].index={tmp_path / 'different.json'}"
    scored = evaluate(tmp_path / "run", ["data.examples.batch_size=7", different])
    run = load_run(tmp_path / "run", CPU, [different])
    assert isinstance(run.task, Retrieval)
    samples = [place.load() for place in run.task.open_held_out()["examples"]]
    rng = np.random.default_rng(0)
    with torch.no_grad():
        images = [to_float(run.task.prepare(each, "examples", rng, False)["image"]) for each in samples]
        image_embedding = torch.cat([run.model(image[None]).image_embedding for image in images])
        text_embedding = torch.cat([run.task.embed_texts(run.model, [t]) for each in samples for t in each.texts])
    naive = recall_at_k(image_embedding @ text_embedding.T, np.repeat(np.arange(len(images)), 2))
    assert scored.pop("mean_recall") == pytest.approx(naive.pop("mean"))
    assert scored == pytest.approx({f"{way}/{k}": value for way, each in naive.items() for k, value in each.items()})


def test_equal_captions_tie_in_retrieval(recipe):
    """However their embeddings were rounded: the first of them in the index is the one that is found."""
    task = make_task(recipe("retrieval"), CPU)
    task.open_held_out()
    images, texts = np.eye(16, dtype=np.float32), np.eye(16, dtype=np.float32)
    images[1] = images[2]
    texts[1] = texts[0] * (1 + 1e-6)
    predictions = [
        {
            "id": key,
            "image_id": i,
            "image": images[i],
            "captions": [f"a disc and {max(i, 1)} bars"],
            "texts": texts[[i]],
        }
        for i, key in enumerate(task.held_out.ids)
    ]
    assert task.score(predictions)["image_to_text/recall@1"] == 100 * 15 / 16  # all but number 1


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_two_ranks_equal_one_process(task, recipe, tmp_path):
    config = recipe(task, "model.ffn.kind=dense", "steps=3", "eval_every=3", f"out={tmp_path / 'one'}")
    train(config)
    (tmp_path / "two.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "vlmoe"]
    subprocess.run(
        [*command, "train", str(tmp_path / "two.yaml"), f"out={tmp_path / 'two'}"],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for ours, theirs in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        ours, theirs = ({k: v for k, v in line.items() if k != "train/seconds"} for line in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=1e-3)
    weights = [read_tensors(latest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_rows_of_one_picture_are_one_picture(task, recipe, tiny_examples, tmp_path):
    """A line a caption in a file of one's own scores as COCO's file does, where a picture has all of its captions."""
    train(recipe(task, "steps=1"))
    expected = evaluate(tmp_path / "run", [])
    content = json.loads((tiny_examples.folder / "coco/captions_val.json").read_text())
    rows = [{"image": f"{each['image_id']:04}.png", "text": each["caption"]} for each in content["annotations"]]
    (tmp_path / "own.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = f"{{format: jsonl, index: {tmp_path}/own.jsonl, images: {tiny_examples.folder}/images}}"
    found = evaluate(tmp_path / "run", [f"data.examples.eval_sources=[{source}]"])
    assert found == pytest.approx(expected, abs=1e-4)
    if task == "captioning":
        written = json.loads((tmp_path / "run" / "captions.json").read_text())
        assert [row["image_id"] for row in written] == [f"{number:04}.png" for number in range(64, 80)]


def test_contrast_takes_no_accumulation(recipe):
    with pytest.raises(UserError, match=r"set optim\.accumulate=1"):
        make_task(recipe("retrieval", "optim.accumulate=2"), CPU)


def test_contrastive_loss_is_clips_and_spares_captions_of_one_picture():
    images, texts = F.normalize(torch.randn(5, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    scale, same = torch.tensor(7.0), torch.arange(5)
    scores = scale * images @ texts.T
    expected = (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
    assert contrastive_loss(images, texts, scale, torch.arange(5)) / 5 == pytest.approx(float(expected))
    twice = contrastive_loss(images, texts, scale, torch.tensor([0, 1, 2, 3, 0]))
    scores = scores.clone()
    scores[0, 4] = scores[4, 0] = -torch.inf
    expected = (F.cross_entropy(scores, same) + F.cross_entropy(scores.T, same)) / 2
    assert twice / 5 == pytest.approx(float(expected))


def test_hidden_words(recipe):
    task = make_task(recipe("captioning"), CPU)
    assert isinstance(task, Captioning)
    rng = np.random.default_rng(0)
    for length, ratio in itertools.product((2, 3, 9, 16), (0.0, 0.5, 0.7, 1.0)):
        masked = hide_words(length, ratio, rng)
        assert not masked[0] and int(masked.sum()) == min(max(1, int(ratio * length + 0.5)), length - 1)
    target = torch.full((4000,), 9)
    text = corrupt(target, torch.arange(4000) >= 2000, task.tokenizer, rng)
    assert (text[:2000] == 9).all()
    shares = [(text[2000:] == task.tokenizer.mask_id).float().mean(), (text[2000:] == 9).float().mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.03)
    assert set(text.tolist()) == set(range(3, task.tokenizer.vocab_size))  # as randint(3, vocab_size - 1) there


def test_label_smoothing_is_the_released_codes(recipe):
    """unilm's BertCaptioningLoss: KL divergence to 1 - eps at the word and eps / (vocab - 1) at each other one."""
    task = make_task(recipe("captioning"), CPU)
    model = task.build_model().eval().requires_grad_(False)
    sample = task.training.load(0)
    part = {k: v[None] for k, v in task.prepare(sample, "examples", np.random.default_rng(0), True).items()}
    part["text_padding"] = torch.zeros_like(part["text"], dtype=torch.bool)
    part["text_masked_at"] = positions(part["text_masked"])
    part["text_at"] = positions(~part["text_padding"])
    part["image"] = to_float(part["image"])
    targets = task.num_targets({"examples": part})
    loss = task.loss(model, {"examples": part}, targets).metrics["words"]
    out = model(part["image"], part["text"], text_masked=part["text_masked"], text_padding=part["text_padding"])
    right, vocab = part["text_target"][part["text_masked"]], out.logits.shape[1]
    wanted = torch.full_like(out.logits, 0.1 / (vocab - 1)).scatter(1, right[:, None], 0.9)
    divergence = F.kl_div(out.logits.log_softmax(-1), wanted, reduction="none").sum(1).mean()
    entropy = -(wanted * wanted.log()).sum(1).mean()
    assert float(loss) == pytest.approx(float(divergence + entropy), rel=1e-4)


def test_heads_of_the_start_come_along_where_they_fit(recipe, tmp_path):
    train(recipe("captioning", "steps=1"))
    saved = read_tensors(latest_checkpoint(tmp_path / "run") / "model.safetensors")
    for task, fit in (
        ("captioning", set(saved)),
        ("retrieval", {name for name in saved if name.startswith("encoder.")}),
    ):
        started = make_task(recipe(task, f"init={tmp_path / 'run'}"), CPU)
        model = started.build_model()
        started.start(model)
        own = model.state_dict()
        assert fit <= own.keys() and all(torch.equal(own[name], saved[name]) for name in fit)
