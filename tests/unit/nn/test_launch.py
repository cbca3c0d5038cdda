"""Which launches are taken for launches of one compiled kernel."""

from types import SimpleNamespace

import pytest
import torch

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
