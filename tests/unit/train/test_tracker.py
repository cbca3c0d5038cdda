"""The progress line says how fast a run is now."""

import time

from vlmoe.config import load
from vlmoe.train.tracker import Tracker


def test_a_slow_start_is_soon_forgotten(pretrain_recipe, tmp_path, monkeypatch, capsys):
    config = load(pretrain_recipe, ["steps=200", f"out={tmp_path / 'run'}"])
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    tracker = Tracker(config, 0)
    for step in range(10, 110, 10):
        now += 80 if step == 10 else 2  # ten steps: compilation, then two seconds
        tracker.progress(step, "")
    *_, before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("step 100/200  4.8") and "0:21 left" in last
    assert before.startswith("step 90/200  4.7")
