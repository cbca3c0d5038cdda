"""Released checkpoints into the project and back; the golden files of the official models stand in for them."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from convert_checkpoint import main, read_pth, to_official, to_project
from safetensors.torch import load_file, save_file

from vlmoe.config import FFNConfig, ModelConfig, PretrainConfig, load, to_yaml
from vlmoe.errors import UserError
from vlmoe.models import beit3_task_from_state_dict, build_encoder
from vlmoe.models.weights import read_tensors
from vlmoe.tasks import load_run
from vlmoe.train.trainer import evaluate

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
VOCAB, TEXT_ROWS = 90, (48, 64)  # of the tables in the golden files; the encoder's text positions are more


def write_pth(folder: Path, name: str) -> Path:
    tensors = load_file(GOLDEN / f"beit3_{name}.safetensors")
    state = {key: tensor for key, tensor in tensors.items() if key.split(".")[0] not in ("in", "out")}
    torch.save({"model": state, "args": argparse.Namespace(task=name)}, folder / f"{name}.pth")
    return folder / f"{name}.pth"


@pytest.mark.parametrize("name", ["encoder", "vqa", "nlvr2", "retrieval", "captioning", "classification"])
def test_there_and_back_is_bit_equal(name, tmp_path, tiny_world):
    source, out = write_pth(tmp_path, name), tmp_path / "project"
    to_project(source, out, tokenizer=Path(tiny_world.spm), attn_heads=4)
    config = load(out / "recipe.yaml")
    assert config.task == ("pretrain" if name == "encoder" else name)
    rows = len(read_tensors(out / "model.safetensors")["encoder.text_embed.tokens.weight"])
    official, vocab = read_pth(source), 120 if name == "encoder" else VOCAB
    assert rows < vocab
    to_official(out, tmp_path / "back.pth", vocab_rows=vocab, text_rows=TEXT_ROWS[name == "encoder"])
    back = read_pth(tmp_path / "back.pth")
    assert back.keys() == official.keys()
    for key, tensor in official.items():
        assert back[key].shape == tensor.shape
        used = slice(rows) if key.startswith(("beit3.text_embed", "mlm_head")) else slice(None)
        assert torch.equal(back[key][used] if tensor.dim() else back[key], tensor[used] if tensor.dim() else tensor)


def test_another_image_size_resizes_the_vision_positions(tmp_path, tiny_world):
    out = tmp_path / "large"
    to_project(write_pth(tmp_path, "retrieval"), out, tokenizer=Path(tiny_world.spm), attn_heads=4, image_size=48)
    assert read_tensors(out / "model.safetensors")["encoder.vision_embed.positions"].shape == (36 + 3, 32)
    assert load(out / "recipe.yaml").model.image_size == 48


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
def test_a_converted_model_says_what_the_official_one_says(task, tmp_path, tiny_world, finetune_recipe):
    """The recipe brings its data and its text length along, so that evaluation works and captions end in time."""
    out = tmp_path / "project"
    recipe = finetune_recipe(task, "coco", init="nowhere")
    to_project(write_pth(tmp_path, task), out, recipe=recipe, attn_heads=4)
    config = load(out / "recipe.yaml")
    assert config.init is None and config.model.max_text_length == 16 and config.data.text.model == tiny_world.spm
    run = load_run(out, torch.device("cpu"), [])
    golden = load_file(GOLDEN / f"beit3_{task}.safetensors")
    given = {key.removeprefix("in."): tensor for key, tensor in golden.items() if key.startswith("in.")}
    given["text"] = given["text"].clamp(max=run.task.tokenizer.vocab_size - 1)  # the golden vocabulary is larger
    found = run.model(**given)
    if task == "retrieval":
        torch.testing.assert_close(found.image_embedding, golden["out.image_embedding"], atol=1e-5, rtol=0.0)
    expected = beit3_task_from_state_dict(task, read_pth(tmp_path / f"{task}.pth"), attn_heads=4).eval()(**given)
    ours, theirs = (getattr(each, "text_embedding" if task == "retrieval" else "logits") for each in (found, expected))
    torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], atol=1e-5, rtol=0.0)
    assert evaluate(out, [])
    with pytest.raises(UserError, match=f"is a model of task {task}, but .* is of task nlvr2"):
        to_project(tmp_path / f"{task}.pth", tmp_path / "b", recipe=finetune_recipe("nlvr2", "nlvr2"), attn_heads=4)


def test_labels_come_along(tmp_path, tiny_world):
    labels = tmp_path / "answer2label.txt"
    labels.write_text("".join(json.dumps({"answer": f"answer {i}", "label": i}) + "\n" for i in range(11)))
    out = tmp_path / "vqa"
    to_project(write_pth(tmp_path, "vqa"), out, tokenizer=Path(tiny_world.spm), attn_heads=4, labels=labels)
    assert (out / "labels.txt").read_text().splitlines() == [f"answer {i}" for i in range(11)]
    assert load_run(out, torch.device("cpu"), []).task.labels[10] == "answer 10"
    with pytest.raises(UserError, match="task nlvr2, which has no labels"):
        to_project(
            write_pth(tmp_path, "nlvr2"), tmp_path / "b", tokenizer=Path(tiny_world.spm), attn_heads=4, labels=labels
        )


def test_what_is_wrong_is_one_line(tmp_path, tiny_world, monkeypatch, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    (tmp_path / "short.pth").write_bytes(b"PK")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"model": {"head.weight": torch.ones(2)}}, tmp_path / "other.pth")
    good = write_pth(tmp_path, "vqa")
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:5000])
    state = read_pth(good)
    torch.save({key: tensor for key, tensor in state.items() if key != "head.3.bias"}, tmp_path / "headless.pth")
    (tmp_path / "two.txt").write_text('{"answer": "a", "label": 0}\n{"answer": "b", "label": 1}\n')
    (tmp_path / "there").mkdir()
    for source, more, message in [
        (tmp_path / "evil.pth", [], "not a file of tensors"),
        (tmp_path / "short.pth", [], "not a file of tensors"),
        (tmp_path / "empty.pth", [], "not a file of tensors"),
        (tmp_path / "text.pth", [], "not a file of tensors"),
        (tmp_path / "cut.pth", [], "not a file of tensors"),
        (tmp_path / "headless.pth", [], "checkpoint key head.3.bias is missing"),
        (good, ["--labels", str(tmp_path / "two.txt")], "two.txt has 2 labels, but"),
        (tmp_path / "list.pth", [], "holds no state dict"),
        (tmp_path / "other.pth", [], "checkpoint key beit3.vision_embed.proj.weight is missing"),
        (tmp_path / "none.pth", [], "does not exist"),
        (good, ["--out", str(tmp_path / "there")], "exists; delete it"),
        (good, ["--attn-heads", "5"], "attn_heads 5 does not divide"),
        (tmp_path, [], "has no checkpoint"),
    ]:
        arguments = [str(source), "--out", str(tmp_path / "out"), "--tokenizer", tiny_world.spm, *more]
        monkeypatch.setattr("sys.argv", ["convert_checkpoint", *arguments])
        assert main() == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and "weights_only" not in said
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


def test_released_sizes(tmp_path, tiny_world, monkeypatch, capsys):
    to_project(write_pth(tmp_path, "captioning"), tmp_path / "a", tokenizer=Path(tiny_world.spm), attn_heads=4)
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "a"), "--out", str(tmp_path / "b.pth"), "--released-sizes"])
    assert main() == 0 and capsys.readouterr().out.strip() == str(tmp_path / "b.pth")
    state = read_pth(tmp_path / "b.pth")
    assert state["beit3.text_embed.weight"].shape == state["mlm_head.weight"].shape == (64010, 32)
    assert state["beit3.encoder.embed_positions.B.weight"].shape == (1024, 32)
    assert (state["mlm_head.bias"][VOCAB:] == -1e4).all() and len(state["mlm_head.bias"]) == 64010


def test_a_sparse_run_has_no_official_form(tmp_path):
    model = ModelConfig(dim=16, depth=2, attn_heads=2, image_size=16, ffn=FFNConfig(num_experts=2, hidden_dim=8))
    tensors = {f"encoder.{name}": tensor for name, tensor in build_encoder(model, 20).state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text(to_yaml(PretrainConfig(task="pretrain", model=model)))
    with pytest.raises(UserError, match="only a decoupled, dense encoder"):
        to_official(tmp_path, tmp_path / "x.pth")
