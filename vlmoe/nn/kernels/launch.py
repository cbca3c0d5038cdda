"""Launching kernels at about half the host's time that `kernel[grid](...)` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlmoe.nn.kernels import INTERPRETED

_kernels: dict[int, tuple[int, Any]] = {}  # by id: how many parameters come before the constants
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """`kernel[grid](*arguments, **named)`, whose first argument is a tensor.

    At each launch Triton looks at every argument to find the compiled kernel, which takes longer than many a kernel runs.
    From its second launch on, a kernel is found here, by just what Triton compiles it for.
    """
    values = arguments
    if len(values) < len(kernel.arg_names):
        values = (*values, *[named[name] for name in kernel.arg_names[len(values) :]])
    key = None if INTERPRETED else _key(kernel, values, named)
    compiled = _compiled.get(key) if key else None
    if compiled:
        compiled[(*grid, 1, 1)[:3]](*values)
        return
    compiled = kernel[grid](*arguments, **named)
    if key:
        _compiled[key] = compiled


def launch_by_name(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], **options: int) -> None:
    """The same; what the kernel has no parameter for is left out of `arguments`."""
    launch(kernel, grid, *[arguments[name] for name in kernel.arg_names], **options)


def _key(kernel: Any, values: Sequence[Any], options: dict[str, Any]) -> tuple[Any, ...] | None:
    """Dtypes, whether integers are 1, multiples of 16 or need 64 bits, the values of constants, and the compiler's options.

    None if not all pointers are multiples of 16 bytes: such a launch is left to Triton.
    """
    get = options.get
    count, _ = _kernels.get(id(kernel)) or _look_at(kernel)
    key = [id(kernel), values[0].get_device(), get("num_warps"), get("num_stages"), get("maxnreg"), *values[count:]]
    addresses = 0
    for value in values[:count]:
        if isinstance(value, Tensor):
            key.append(value.dtype)
            addresses |= value.data_ptr()
        elif isinstance(value, int):
            key.append((value == 1, value % 16 == 0, value.bit_length() > 31))
        elif isinstance(value, float) or value is None:
            key.append(type(value))
        else:  # a descriptor, whose block the constants give
            key.append(value.base.dtype)
            addresses |= value.base.data_ptr()
    return None if addresses % 16 else tuple(key)


def _look_at(kernel: Any) -> tuple[int, Any]:
    are_constants = [each.is_constexpr for each in kernel.params]
    count = are_constants.index(True)
    if not all(are_constants[count:]):
        raise TypeError(f"the constants of the kernel {kernel.__name__} are not its last parameters")
    found = _kernels[id(kernel)] = count, kernel  # its id is then no other's
    return found
