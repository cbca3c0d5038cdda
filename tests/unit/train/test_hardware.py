"""What a run says that it computes on."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmoe.config import load
from vlmoe.models import build
from vlmoe.nn import kernels
from vlmoe.train.hardware import describe_hardware

BASE = Path(__file__).parents[3] / "recipes" / "pretrain" / "base.yaml"


@pytest.mark.parametrize(
    "is_hopper, version, changes, said",
    [
        (True, "3.6.0", [], "triton"),
        (True, "3.8.0", [], "triton"),
        (False, "3.9.0", [], "triton"),
        (True, "3.9.0", ["model.ffn.activation=swiglu"], "triton"),
        (True, "3.9.0", ["model.ffn.num_heads=8"], "triton"),
        (
            True,
            "3.9.0",
            [],
            "triton (portable kernels; those for Hopper run with Triton 3.6 and 3.8 (torch 2.11 and 2.14), not 3.9.0)",
        ),
    ],
)
def test_kernels_that_another_triton_would_run_faster_are_named(
    is_hopper: bool, version: str, changes: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(kernels, "is_hopper", lambda _: is_hopper)
    monkeypatch.setattr(build, "_no_rows", lambda config, *_: torch.empty(0, config.dim // config.ffn.num_heads))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    config = load(BASE, ["precision=bf16", "model.ffn.backend=triton", *changes])
    assert describe_hardware(config, torch.device("cuda"), 2) == f"2 x NVIDIA H100, bf16, experts on {said}"
