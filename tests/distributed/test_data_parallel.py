"""Two processes (gloo) compute what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vlmoe.config import load
from vlmoe.models.weights import latest_checkpoint, read_tensors
from vlmoe.train import parallel
from vlmoe.train.tracker import read_metrics
from vlmoe.train.trainer import train


def test_two_ranks_equal_one_process(pretrain_recipe: Path, tiny_world, broken_shard, tmp_path: Path):
    changes = ["model.ffn.kind=dense", "model.drop_path=0", "steps=4", "eval_every=4", "data.max_bad_fraction=0.9"]
    changes += [f"data.pairs.sources=[{{shards: {tiny_world.pairs}}}, {{shards: {broken_shard}}}]"]
    train(load(pretrain_recipe, [*changes, f"out={tmp_path / 'one'}"]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "vlmoe",
        "train",
    ]
    subprocess.run(
        [*command, str(pretrain_recipe), *changes, f"out={tmp_path / 'two'}"],
        check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for ours, theirs in zip(one, two, strict=True):
        timeless = {key for key in ours if key != "train/seconds" and "image_shuffled" not in key}
        assert {key: ours[key] for key in timeless} == pytest.approx({key: theirs[key] for key in timeless}, rel=1e-4)
    assert any("bad_samples/undecodable image" in line for line in one)
    weights = [read_tensors(latest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name


def test_what_no_batch_reaches_keeps_no_gradient(tmp_path: Path):
    """As on one rank: an optimiser would decay it."""
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    layers[0](torch.ones(1, 2)).sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel.sum_gradients(layers)
    finally:
        parallel.leave()
    assert all(each.grad is not None for each in layers[0].parameters())
    assert all(each.grad is None for each in layers[1].parameters())
