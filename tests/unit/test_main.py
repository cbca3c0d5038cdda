"""The command line: exit codes, and one line for what the user can mend."""

from pathlib import Path

import pytest
import yaml

from vlmoe.__main__ import main
from vlmoe.errors import UserError


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("vlmoe: ") and sum(line.startswith("vlmoe: ") for line in said) == 1
    return said[-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dimm=64", "did you mean 'dim'?"),
        ("model.dim=wide", "could not be converted"),
        ("data.pairs.sources=[{shards: nothing-*.tar}]", "nothing-*.tar"),
        ("data.pairs.sources=[]", "data.pairs.sources"),
        ("data.pairs.eval_shards=[nothing.tar]", "data.pairs.eval_shards[0]"),
        ("model.image_size=30", "model.image_size 30 is not a multiple of model.patch_size 8"),
        ("model.image_size=40", "model.image_size is 40, but the visual tokenizer"),
        ("model.attn_heads=5", "model.dim 32 is not divisible by model.attn_heads 5"),
        ("model.ffn.num_heads=3", "model.dim 32 is not divisible by model.ffn.num_heads 3"),
        ("model.ffn.top_k=9", "model.ffn.top_k 9 is not between 1 and model.ffn.num_experts 4"),
        ("model.ffn={num_heads: 8, backend: grouped}", "model.ffn.backend=grouped needs a multiple of 8"),
        ("visual_tokenizer=nowhere", "nowhere has no checkpoint"),
        ("visual_tokenizer=null", "visual_tokenizer is not set"),
        ("data.text.model=nothing.model", "nothing.model"),
        ("data.pairs.batch_size=10", None),
        ("optim.accumulate=3", "multiple of 3"),
        ("steps=0", "steps"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(pretrain_recipe, tmp_path, capsys, override, message):
    if message is None:
        assert main(["train", str(pretrain_recipe), f"out={tmp_path}", "steps=1", override]) == 0
    else:
        assert message in refusal(capsys, "train", str(pretrain_recipe), f"out={tmp_path}", override)
        assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_another_shape(pretrain_recipe, tmp_path, capsys):
    assert main(["train", str(pretrain_recipe), f"out={tmp_path}", "steps=1"]) == 0
    folder = tmp_path / "checkpoints" / "step-00000001"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"]["dim"] = 64
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = refusal(capsys, "evaluate", str(tmp_path))
    assert "does not fit" in said and "[32]" in said and "[64]" in said


@pytest.mark.parametrize("file", ["model.safetensors", "recipe.yaml"])
def test_a_damaged_checkpoint(pretrain_recipe, tmp_path, capsys, file):
    assert main(["train", str(pretrain_recipe), f"out={tmp_path}", "steps=1"]) == 0
    (tmp_path / "checkpoints" / "step-00000001" / file).write_bytes(b"\x80\x04: not it")
    assert file in refusal(capsys, "evaluate", str(tmp_path))


def test_a_pickle_is_never_opened(pretrain_recipe, tmp_path, capsys):
    import pickle

    folder = tmp_path / "checkpoints" / "step-00000001"
    assert main(["train", str(pretrain_recipe), f"out={tmp_path}", "steps=1"]) == 0

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    refusal(capsys, "evaluate", str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_config_prints_what_train_will_do(pretrain_recipe, capsys):
    assert main(["config", str(pretrain_recipe), "steps=3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["steps"] == 3 and shown["model"]["ffn"]["gate"] == "linear"


def test_evaluate_scores_a_run(pretrain_recipe, tmp_path, capsys):
    assert main(["train", str(pretrain_recipe), f"out={tmp_path}", "steps=1"]) == 0
    trained = capsys.readouterr().out
    assert main(["evaluate", str(tmp_path)]) == 0
    scored = yaml.safe_load(capsys.readouterr().out)
    assert f"{scored['pairs_text/perplexity']:.4f}" in trained


def test_the_demo_reads_the_recipes_of_its_checkout(tmp_path, monkeypatch, capsys):
    from vlmoe import demo

    def stop(config):
        raise UserError(f"recipe of {config.out}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_script", lambda *arguments: None)
    monkeypatch.setattr(demo, "train", stop)
    assert refusal(capsys, "demo") == "vlmoe: recipe of runs/demo/visual_tokenizer"


def test_settings_may_stand_behind_options(pretrain_recipe, tmp_path, capsys):
    assert main(["train", str(pretrain_recipe), f"out={tmp_path}", "steps=1"]) == 0
    capsys.readouterr()
    assert "nonsense" in refusal(capsys, "predict", str(tmp_path), "--caption", "--image", "a.png", "nonsense=1")
    with pytest.raises(SystemExit, match="2"):
        main(["predict", str(tmp_path), "--caption", "--image", "a.png", "--nonsense"])
