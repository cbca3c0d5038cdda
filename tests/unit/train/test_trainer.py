"""The training loop: it learns, it stops and goes on bit-equal, and it never saves nonsense."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlmoe.config import load
from vlmoe.errors import UserError
from vlmoe.models.weights import checkpoint_steps, latest_checkpoint, read_tensors
from vlmoe.train import checkpoint, trainer
from vlmoe.train.tracker import read_metrics
from vlmoe.train.trainer import evaluate, train


def losses(run: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key != "train/seconds"} for line in read_metrics(run)]


@pytest.fixture(scope="session")
def uninterrupted(pretrain_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(load(pretrain_recipe, [f"out={run}"]))
    return run


@pytest.mark.parametrize(("stops", "workers"), [((5,), 0), ((1, 11), 2)])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    pretrain_recipe, uninterrupted, tmp_path, stops, workers
):
    for stop in stops:
        train(load(pretrain_recipe, [f"out={tmp_path}", f"stop_at={stop}"]))
    train(load(pretrain_recipe, [f"out={tmp_path}", f"data.workers={workers}"]))
    assert losses(tmp_path) == losses(uninterrupted)
    ours, theirs = (read_tensors(latest_checkpoint(run) / "model.safetensors") for run in (tmp_path, uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_bit_equal(pretrain_recipe, uninterrupted, tmp_path, number):
    command = [sys.executable, "-m", "vlmoe", "train", str(pretrain_recipe), f"out={tmp_path}", "checkpoint_every=2"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env={**os.environ, **threads}, stderr=subprocess.DEVNULL)
    while len(checkpoint_steps(tmp_path)) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL) or 12 in checkpoint_steps(
        tmp_path
    )
    train(load(pretrain_recipe, [f"out={tmp_path}", "checkpoint_every=2"]))
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_signal_to_the_whole_group_of_processes_leaves_the_workers_to_the_last_step(
    pretrain_recipe, uninterrupted, tmp_path
):
    command = [sys.executable, "-m", "vlmoe", "train", str(pretrain_recipe), f"out={tmp_path}", "data.workers=2"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, env={**os.environ, **threads}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith("step 2/"):
        assert line, "the run ended before its second step"
    os.killpg(process.pid, signal.SIGTERM)
    rest = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in rest and "the same command goes on from there" in rest
    train(load(pretrain_recipe, [f"out={tmp_path}"]))
    assert losses(tmp_path) == losses(uninterrupted)


def test_a_signal_in_the_last_step_interrupts_nothing(pretrain_recipe, tmp_path, monkeypatch):
    sent: list[int] = []

    def signalled(step: int, steps: int, config: object) -> float:
        if step == steps - 1 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return 1e-3

    monkeypatch.setattr("vlmoe.train.trainer.learning_rate", signalled)
    outcome = train(load(pretrain_recipe, [f"out={tmp_path}", "steps=2"]))
    assert outcome.step == 2 and not outcome.was_interrupted


def test_accumulation_changes_nothing_but_memory(pretrain_recipe, tmp_path):
    dense = ["model.ffn.kind=dense", "model.drop_path=0", "steps=4"]
    for name, accumulate in (("whole", 1), ("split", 4)):
        train(load(pretrain_recipe, [*dense, f"out={tmp_path / name}", f"optim.accumulate={accumulate}"]))
    whole, split = (losses(tmp_path / name)[:4] for name in ("whole", "split"))
    for one, other in zip(whole, split, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_compiled_run_computes_the_same(pretrain_recipe, uninterrupted, tmp_path, monkeypatch):
    """Blocks and the loss become graphs, all others stay as they are; the graphs run on torch's operators."""
    compiled: list[str] = []

    def compile_with_eager(module: torch.nn.Module) -> None:
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_eager)
    train(load(pretrain_recipe, [f"out={tmp_path}", "compile=true"]))
    assert set(compiled) == {"Block", "SummedCrossEntropy"}
    ours, theirs = (read_tensors(latest_checkpoint(run) / "model.safetensors") for run in (tmp_path, uninterrupted))
    assert ours.keys() == theirs.keys()
    for line, other in zip(losses(tmp_path), losses(uninterrupted), strict=True):
        for name, value in line.items():  # where two experts are as probable, rounding decides: a slot goes either way
            allowed = {"abs": 2 / 1024} if name.endswith("_load") else {"rel": 1e-4}
            assert value == pytest.approx(other[name], **allowed), name
        assert line.keys() == other.keys()


def test_it_learns(pretrain_recipe, tmp_path):
    outcome = train(load(pretrain_recipe, [f"out={tmp_path}", "steps=200", "eval_every=200", "log_every=200"]))
    assert outcome.metrics["texts_text/perplexity"] < 0.6 * outcome.metrics["texts_text/unigram_perplexity"]
    assert outcome.metrics["pairs_image/perplexity"] < 0.6 * outcome.metrics["pairs_image/unigram_perplexity"]
    assert evaluate(tmp_path, []) == outcome.metrics


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(pretrain_recipe, tmp_path, monkeypatch):
    train(load(pretrain_recipe, [f"out={tmp_path}", "stop_at=3"]))
    before = read_tensors(latest_checkpoint(tmp_path) / "model.safetensors")
    monkeypatch.setattr("vlmoe.train.trainer.learning_rate", lambda *_: float("nan"))
    with pytest.raises(
        UserError, match=r"NaN or infinite at step 5; checkpoint .*step-00000003 is good: lower optim.lr"
    ):
        train(load(pretrain_recipe, [f"out={tmp_path}"]))
    with pytest.raises(
        UserError, match=r"between steps 4 and 6; .*set another `out` \(init=.*step-00000003 starts from its"
    ):
        health = trainer._Health(load(pretrain_recipe, [f"out={tmp_path}"]), 3)
        for step in (4, 5, 6):
            health.watch({"loss": torch.tensor(torch.nan), "gradient_norm": torch.ones(())}, step, look=step == 6)
    assert checkpoint_steps(tmp_path) == [3]
    after = read_tensors(latest_checkpoint(tmp_path) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_full_disk_loses_nothing(pretrain_recipe, tmp_path, monkeypatch):
    train(load(pretrain_recipe, [f"out={tmp_path}", "stop_at=3"]))

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", no_room)
        with pytest.raises(UserError, match=r"No space left on device.* MiB are free .*make room"):
            train(load(pretrain_recipe, [f"out={tmp_path}", "stop_at=6"]))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    train(load(pretrain_recipe, [f"out={tmp_path}", "stop_at=6"]))
    assert checkpoint_steps(tmp_path) == [3, 6]


def test_another_recipe_in_the_same_folder_is_refused(pretrain_recipe, tmp_path):
    train(load(pretrain_recipe, [f"out={tmp_path}", "stop_at=1"]))
    with pytest.raises(
        UserError, match=r"another recipe: model.ffn.num_experts is 4 there and 8 here; set another `out`"
    ):
        train(load(pretrain_recipe, [f"out={tmp_path}", "model.ffn.num_experts=8"]))


def test_old_checkpoints_are_pruned(pretrain_recipe, tmp_path):
    train(load(pretrain_recipe, [f"out={tmp_path}", "checkpoint_every=3", "keep_checkpoints=2"]))
    assert checkpoint_steps(tmp_path) == [9, 12]


def test_broken_samples_are_counted_and_named_and_too_many_stop_the_run(
    pretrain_recipe, tiny_world, broken_shard, tmp_path, caplog
):
    sources = f"data.pairs.sources=[{{shards: {tiny_world.pairs}}}, {{shards: {broken_shard}}}]"
    train(load(pretrain_recipe, [f"out={tmp_path / 'a'}", sources, "data.max_bad_fraction=0.5"]))
    count = max(line.get("bad_samples/undecodable image", 0) for line in read_metrics(tmp_path / "a"))
    named = [each.message for each in caplog.records if each.message.startswith("broken sample")]
    assert 0 < len(named) == min(count, 20)
    assert all(re.fullmatch(rf"broken sample: {broken_shard} key \d+ \(undecodable image\)", line) for line in named)
    with pytest.raises(UserError, match=r"samples are broken.*undecodable image .*broken.tar"):
        train(load(pretrain_recipe, [f"out={tmp_path / 'b'}", sources]))


def test_broken_held_out_samples_are_counted_and_named_and_too_many_stop_it(
    pretrain_recipe, tiny_world, broken_shard, tmp_path, caplog
):
    shards = f"data.pairs.eval_shards=[{tiny_world.held_out}, {broken_shard}]"
    train(load(pretrain_recipe, [f"out={tmp_path / 'run'}", "steps=1"]))
    figures = evaluate(tmp_path / "run", [shards, "data.max_bad_fraction=0.9"])
    assert figures["bad_samples/undecodable image"] == 32
    assert sum(f"broken sample: {broken_shard}" in each.message for each in caplog.records) == 20
    again = shutil.copy(broken_shard, tmp_path / "again.tar")
    with pytest.raises(UserError, match=r"64 of 128 samples are broken.*mend the shards or raise it"):
        evaluate(tmp_path / "run", [f"data.pairs.eval_shards=[{tiny_world.held_out}, {broken_shard}, {again}]"])


def test_damaged_state_and_odd_folders(pretrain_recipe, tmp_path):
    train(load(pretrain_recipe, [f"out={tmp_path}", "stop_at=1"]))
    (tmp_path / "checkpoints" / "step-copied00").mkdir()
    assert checkpoint_steps(tmp_path) == [1]
    (tmp_path / "metrics.jsonl").write_text("{nonsense}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
        train(load(pretrain_recipe, [f"out={tmp_path}"]))
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state.json is missing or damaged \(step or bad_samples is not there\)"):
        train(load(pretrain_recipe, [f"out={tmp_path}"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend may run there")
def test_a_backend_that_cannot_run_here_is_refused_before_the_run(pretrain_recipe, tmp_path):
    with pytest.raises(UserError, match=r"model.ffn: backend 'triton' needs"):
        train(load(pretrain_recipe, [f"out={tmp_path}", "model.ffn.backend=triton"]))
    assert not (tmp_path / "metrics.jsonl").exists()
