"""Which launches are taken for launches of one compiled kernel, and that these hand the device what Triton hands it."""

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmoe.nn.kernels.launch import _key


def kernel(**is_constexpr: bool) -> SimpleNamespace:
    params = [SimpleNamespace(is_constexpr=each) for each in is_constexpr.values()]
    return SimpleNamespace(__name__="kernel", arg_names=list(is_constexpr), params=params)


KERNEL = kernel(x=False, scale=False, rows=False, WIDTH=True, EXACT=True)
X = torch.zeros(64, dtype=torch.bfloat16)
USUAL = (X, 0.5, 48, 128, True)


@pytest.mark.parametrize(
    "values, options, same",
    [
        ((torch.ones_like(X), 0.25, 48, 128, True), {}, True),
        ((X, 0.5, 4096, 128, True), {}, True),
        ((X.half(), 0.5, 48, 128, True), {}, False),
        ((X, None, 48, 128, True), {}, False),
        ((X, 0.5, 49, 128, True), {}, False),
        ((X, 0.5, 48 << 32, 128, True), {}, False),
        ((X, 0.5, 48, 64, True), {}, False),
        ((X, 0.5, 48, 128, False), {}, False),
        (USUAL, {"num_warps": 8}, False),
        (USUAL, {"maxnreg": 128}, False),
        (USUAL, {"EXACT": True}, True),
    ],
)
def test_what_triton_compiles_anew_for(values: tuple, options: dict, same: bool) -> None:
    assert (_key(KERNEL, values, options) == _key(KERNEL, USUAL, {})) is same


def test_what_triton_compiles_anew_for_one() -> None:
    keys = {_key(KERNEL, (X, 0.5, rows, 128, True), {}) for rows in (0, 1, 2, 3, 16, 17, 32, 1 << 31, (1 << 31) + 1)}
    assert len(keys) == 5


def test_another_kernel_of_the_same_values() -> None:
    other = kernel(x=False, scale=False, rows=False, WIDTH=True, EXACT=True)
    assert _key(other, USUAL, {}) != _key(KERNEL, USUAL, {})


def test_pointers_off_multiples_of_16_bytes_are_left_to_triton() -> None:
    assert _key(KERNEL, (X[1:], *USUAL[1:]), {}) is None


def test_a_constant_before_the_last_variable_is_refused() -> None:
    mixed = kernel(x=False, WIDTH=True, rows=False)
    with pytest.raises(TypeError, match="kernel are not its last parameters"):
        _key(mixed, (X, 128, 48), {})


class RecordingDriver:
    """In the place of Triton's for a GPU: kernels are compiled for Hopper and not run."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, None, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 232448}
        )

    def get_current_device(self) -> int:
        return 99  # no GPU's kernels are replaced by these

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launcher(x: int, y: int, z: int, stream: int, function: Any, *arguments: Any) -> None:
            given = arguments[-len(source.fn.arg_names) :]
            kinds = [(tuple(each.shape), each.dtype) if isinstance(each, Tensor) else each for each in given]
            self.launches.append((metadata.name, (x, y, z), kinds))

        return launcher


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def experts_backward() -> list[Any]:
    E, hidden, dim, rows = 4, 64, 32, 48
    bank = zeros(E, hidden, dim), zeros(E, dim, hidden), zeros(E, hidden), zeros(E, dim), None, None
    slots, ends, base = (zeros(size, dtype=torch.int32) for size in (2 * rows, E, E + 1))
    tiles = zeros(E, dtype=torch.int32), zeros(E, dtype=torch.int32), base
    weights, expert_ids = zeros(rows, 2, dtype=torch.float32), zeros(rows, 2, dtype=torch.int64)
    return [zeros(rows, dim), *tiles, zeros(rows, dim), expert_ids, weights, slots, ends, *bank, "gelu"]


def norm_of_nothing_added() -> list[Any]:
    return [zeros(7, 32), None, None, zeros(32), zeros(32), 1e-5, torch.bfloat16]


def attention_backward() -> list[Any]:
    vision, text, spans = zeros(2, 5, 96), zeros(1, 9, 96), zeros(2, 2, dtype=torch.int32)
    y = [zeros(2, 5, 32), zeros(1, 9, 32)]
    return [*y, vision, text, spans, *y, zeros(2, 19, dtype=torch.float32), 8]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    "module, name, draw",
    [
        ("ops", "expert_mlp_backward", experts_backward),
        ("norm_ops", "add_norm", norm_of_nothing_added),
        ("attention_ops", "attend_parts_backward", attention_backward),
    ],
)
def test_a_kernel_found_again_gets_what_triton_gave_it(
    module: str, name: str, draw: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import JITFunction, driver

    recording = RecordingDriver()
    monkeypatch.setattr(driver, "_active", recording)
    operator = getattr(importlib.import_module(f"vlmoe.nn.kernels.{module}"), name)
    operator(*draw())
    first = recording.launches[:]
    recording.launches.clear()
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    operator(*draw())
    assert recording.launches == first != []
