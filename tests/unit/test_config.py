"""Recipes: inheritance, overrides, and one clear line for each mistake."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmoe.config import PretrainConfig, differences, load, to_yaml
from vlmoe.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: pretrain\nmodel: {dim: 64, ffn: {top_k: 1}}\ndata: {pairs: {sources: [{shards: a.tar}]}}\n")
    return path


def test_what_is_not_said_has_its_default(recipe):
    config = load(recipe)
    assert isinstance(config, PretrainConfig)
    assert (config.model.dim, config.model.ffn.top_k, config.optim.betas) == (64, 1, (0.9, 0.98))
    assert config.data.pairs.sources[0].shards == "a.tar"


def test_base_then_recipe_then_override(recipe, tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\nmodel: {depth: 2}\nsteps: 7\n")
    config = load(child, ["steps=9", "model.ffn.num_experts=3"])
    assert isinstance(config, PretrainConfig)
    assert (config.model.dim, config.model.depth, config.steps, config.model.ffn.num_experts) == (64, 2, 9, 3)


@settings(max_examples=20)
@given(st.integers(1, 10**6), st.floats(1e-6, 1.0), st.sampled_from(["dense", "moe", "mhmoe"]))
def test_the_resolved_recipe_reads_back_the_same(tmp_path_factory, steps, lr, kind):
    folder = tmp_path_factory.mktemp("roundtrip")
    (folder / "a.yaml").write_text("task: pretrain\n")
    config = load(folder / "a.yaml", [f"steps={steps}", f"optim.lr={lr!r}", f"model.ffn.kind={kind}"])
    (folder / "b.yaml").write_text(to_yaml(config))
    again = load(folder / "b.yaml")
    assert again == config and differences(config, again) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dimm=3", "unknown key 'model.dimm'; did you mean 'dim'?"),
        ("data.pairs.batchsize=3", "unknown key 'data.pairs.batchsize'; did you mean 'batch_size'?"),
        ("modle.dim=3", "unknown key 'modle'; did you mean 'model'?"),
        ("data.pairs.sources=[{shard: b.tar}]", "unknown key 'data.pairs.sources[0].shard'; did you mean 'shards'?"),
        ("model.dim=wide", "model.dim: Value 'wide' of type 'str' could not be converted to Integer"),
        ("steps=null", "steps: Incompatible value 'None' for field of type 'int'"),
        ("model.ffn.kind=sparse", "model.ffn.kind: Invalid value 'sparse', expected one of ['dense', 'moe', 'mhmoe']"),
        ("optim.betas=[1,2,3]", "length 3 does not match"),
        ("optim.betas=[0.9,1.5]", "optim.betas[1] is 1.5; it must be between 0 and 1"),
        ("optim.betas=0.9", "optim.betas is 0.9; it must be a list, not a single value"),
        ("steps=[1]", "steps is [1]; it must be a single value, not a list"),
        ("steps.a=1", "steps is {'a': 1}; it must be a single value, not a mapping of keys"),
        ("optim=[1]", "optim is [1]; it must be a mapping of keys, not a list"),
        ("data.texts.sources={shards: b.tar}", "data.texts.sources is {'shards': 'b.tar'}; it must be a list"),
        ("data.pairs.sources=[b.tar]", "data.pairs.sources[0] is 'b.tar'; it must be a mapping of keys"),
        ("task=[pretrain]", "task is ['pretrain']; choose one of"),
        ("data.pairs.sources[0].upsampling=.inf", "upsampling is inf; it must be at least 0, and finite"),
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("model.max_text_length=2", "model.max_text_length is 2; it must be at least 3"),
        ("model.ffn.dense_dim=0", "model.ffn.dense_dim is 0; it must be at least 1"),
        ("model.patch_size=0", "model.patch_size is 0; it must be at least 1"),
        (f"seed={10**30}", "seed is 1000000000000000000000000000000; it must be between 0 and 9.22337e+18"),
        ("model=[1]", "override 'model=[1]' does not fit"),
        ("steps", "override 'steps' is not key=value"),
        ("steps=0", "steps is 0; it must be at least 1"),
        ("pair_text_mask_ratio=1.5", "pair_text_mask_ratio is 1.5; it must be between 0 and 1"),
        ("optim.eps=0", "optim.eps is 0.0; it must be between 1e-15 and 1"),
        ("model.ffn.capacity_factor=.inf", "model.ffn.capacity_factor is inf; it must be at least 1e-06, and finite"),
        ("optim.lr=-1", "optim.lr is -1.0; it must be at least 0"),
        ("data.pairs.sources[0].upsampling=-1", "data.pairs.sources[0].upsampling is -1.0; it must be at least 0"),
        ("task=dance", "task is 'dance'; choose one of pretrain, visual_tokenizer, vqa"),
    ],
)
def test_a_mistake_gets_one_line_that_names_it(recipe, override, message):
    with pytest.raises(UserError) as caught:
        load(recipe, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_broken_and_circular_recipes(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("task: [pretrain\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load(tmp_path / "a.yaml")
    (tmp_path / "tab.yaml").write_text("task: pretrain\nmodel:\n\tdim: 3\n")
    with pytest.raises(UserError, match=r"is not valid YAML: line 3: found character that cannot start any token"):
        load(tmp_path / "tab.yaml")
    (tmp_path / "below.yaml").write_text("task: pretrain\nmodel: {dim: 64}\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\nmodel: [64]\n")
    with pytest.raises(UserError, match=r"stands where its base below.yaml has a mapping"):
        load(tmp_path / "above.yaml")
    (tmp_path / "nothing.yaml").write_text("task: ${nothing}\n")
    with pytest.raises(UserError, match=r"task is '\$\{nothing\}'; choose one of"):
        load(tmp_path / "nothing.yaml")
    (tmp_path / "b.yaml").write_text("- task\n")
    with pytest.raises(UserError, match="is a mapping"):
        load(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("base: d.yaml\n")
    (tmp_path / "d.yaml").write_text("base: c.yaml\n")
    with pytest.raises(UserError, match="leads back to itself"):
        load(tmp_path / "c.yaml")


def test_differences_name_the_key(recipe):
    (line,) = differences(load(recipe), load(recipe, ["model.ffn.num_experts=3"]))
    assert line == ("model.ffn.num_experts", "model.ffn.num_experts is 16 there and 3 here")


def test_reading_a_recipe_imports_no_torch():
    code = "import sys, vlmoe.config, vlmoe.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
