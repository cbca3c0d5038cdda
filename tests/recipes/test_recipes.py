"""Every recipe loads, and the twins are as equal as their names say."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from vlmoe.config import FinetuneConfig, ModelConfig, PretrainConfig, load, to_yaml
from vlmoe.models.cost import count_parameters, flops_per_token
from vlmoe.train.trainer import train

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe_loads(path: Path):
    assert load(path).steps > 0


def model(name: str) -> ModelConfig:
    config = load(RECIPES / "pretrain" / f"{name}.yaml")
    assert isinstance(config, PretrainConfig)
    return config.model


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_twins_are_equal_in_what_they_say(size: str):
    def cost(twin: str) -> tuple[int, int]:
        return count_parameters(model(size + twin), 8000, 1024)[0], flops_per_token(model(size + twin))

    params, flops = cost("")
    assert cost("_dense_equal_flops")[1] == flops
    assert cost("_dense_equal_params")[0] == pytest.approx(params, rel=5e-3)
    assert cost("_xmoe") == (pytest.approx(params, rel=5e-3), flops)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_mhmoe_recipes_keep_to_what_was_measured(size: str):
    ffn = model(size).ffn
    assert ffn.top_k == 2 and ffn.normalize_weights in (None, True)
    assert 96 <= model(size).dim // ffn.num_heads <= 256


FINETUNE = [path for path in sorted(RECIPES.rglob("*.yaml")) if isinstance(load(path), FinetuneConfig)]


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_fine_tuning_recipe_runs_three_steps(path: Path, tiny_examples, tmp_path: Path):
    """Its task, its formats, its optimiser; a model and pictures small enough for a test, and no minutes of compiling."""
    config = load(path)
    assert isinstance(config, FinetuneConfig)
    small = replace(config.model, dim=32, depth=2, attn_heads=2, image_size=32, patch_size=8, max_text_length=16)
    small.ffn = replace(small.ffn, num_experts=4, num_heads=2, moe_layers=None)
    block = tiny_examples.data(config.data.examples.sources[0].format, 16)
    shrunk = {
        **yaml.safe_load(to_yaml(config)), "out": str(tmp_path), "init": None, "steps": 3, "device": "cpu",
        "compile": False, "model": asdict(small),
    }  # fmt: skip
    shrunk["data"] |= block
    shrunk["optim"]["warmup_steps"] = 1
    if "min_answer_count" in shrunk:
        shrunk["min_answer_count"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(shrunk))
    outcome = train(load(tmp_path / "recipe.yaml"))
    assert outcome.step == 3 and outcome.metrics
