"""Steps of pretraining: what a row counts, and that one model's failure costs only its own row."""

import csv
import sys
from pathlib import Path

import bench
import bench_step
import pytest
import torch
import yaml

from vlmoe.config import FFNConfig, ModelConfig, PretrainConfig, StreamConfig
from vlmoe.models.cost import flops_per_token

RECIPE = {
    "task": "pretrain",
    "model": {"dim": 16, "depth": 2, "attn_heads": 2, "image_size": 16, "max_text_length": 24,
              "ffn": {"kind": "mhmoe", "num_experts": 4, "hidden_dim": 16}},
    "data": {"pairs": {"batch_size": 8}, "texts": {"batch_size": 4}},
}  # fmt: skip
TWINS = {"dense_equal_flops": {"kind": "dense"}, "xmoe": {"kind": "moe", "gate": "xmoe", "num_experts": 0}}


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(RECIPE))
    for name, ffn in TWINS.items():
        text = yaml.safe_dump({"base": "mini.yaml", "model": {"ffn": ffn}})
        (tmp_path / f"mini_{name}.yaml").write_text(text)
    return tmp_path / "mini.yaml"


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "step", *arguments])
    bench.main()


def test_a_model_that_fails_leaves_the_rows_of_the_others(recipe, monkeypatch, capsys):
    """X-MoE of no expert cannot be built."""
    out = recipe.with_name("step.csv")
    arguments = f"--recipe {recipe} --models xmoe mhmoe dense_equal_flops --device cpu --no-compile --batch 2 --steps 1"
    with pytest.raises(SystemExit, match="no row of xmoe"):
        run(monkeypatch, *arguments.split(), "--warmup", "0", "--streams", "all", "--out", str(out))
    assert "xmoe failed" in capsys.readouterr().err
    dense, sparse = csv.DictReader(out.open())
    assert (dense["what"], dense["backend"], dense["tokens_per_second_vs_dense"]) == ("dense_equal_flops", "", "1.0")
    assert (sparse["what"], sparse["streams"], sparse["batch"]) == ("mhmoe", "pairs+texts", "2")
    assert sparse["backend"] and float(sparse["tokens_per_s"]) > 0 and sparse["mfu_percent"] == ""
    assert 2 * 5 + 3 * 3 <= int(sparse["tokens"]) < int(sparse["padded_tokens"])


def test_tokens_and_flops_by_hand():
    config = PretrainConfig(task="pretrain", model=ModelConfig(ffn=FFNConfig(kind="dense"), image_size=16))
    config.data.pairs, config.data.images = StreamConfig(batch_size=4), StreamConfig(batch_size=2)
    inputs = bench_step.random_inputs(config, "all", 8)
    assert {name: len(part["image"]) for name, part in inputs.items()} == {"pairs": 8, "images": 4}
    assert torch.equal(bench_step.random_inputs(config, "pairs", 8)["pairs"]["text"], inputs["pairs"]["text"])
    texts = (~inputs["pairs"]["text_padding"]).sum(1).tolist()
    tokens, padded, squares = bench_step.count_tokens(config.model, inputs)
    assert tokens == 12 * 5 + sum(texts)
    assert padded == 12 * 5 + 8 * inputs["pairs"]["text"].shape[1]
    assert squares == 4 * 5**2 + sum((5 + length) ** 2 for length in texts)
    found = bench_step.model_flops(
        config.model, tokens, squares, {"pairs_text": 7, "images_image": 3, "micro_batches": 1}
    )
    dim, depth = config.model.dim, config.model.depth
    heads = 2 * dim * (7 * bench_step.VOCAB_SIZE + 3 * bench_step.NUM_CODES)
    assert found == 3 * (tokens * flops_per_token(config.model) + depth * 4 * dim * squares + heads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_there_is_one_clear_error(monkeypatch):
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        run(monkeypatch)


def test_a_table_of_other_columns_is_left_alone(tmp_path):
    (tmp_path / "old.csv").write_text("hardware,ms\nx,1\n")
    with pytest.raises(SystemExit, match="has other columns"):
        bench._append(tmp_path / "old.csv", [{"tokens": 1}], {"hardware": "x"})
    assert (tmp_path / "old.csv").read_text() == "hardware,ms\nx,1\n"
