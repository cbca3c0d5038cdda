"""Launching one kernel many times over."""

from collections.abc import Callable, Mapping
from typing import Any


def repeated(kernel: Any, arguments: Mapping[str, Any], **options: int) -> Callable[..., None]:
    """A launcher of `kernel`: called with a grid and, by name, the integers that change from launch to launch.

    At every launch Triton looks at each argument to find the compiled kernel, which for thirty of them takes the host longer
    than a small launch takes the device. Here only the first launch looks, so the kernel must not be specialised on what
    changes (`do_not_specialize`).

    Args:
        arguments: by the names of the kernel's parameters; what it has no parameter for is left out.
        options: of the compiler, such as num_warps.
    """
    names: list[str] = kernel.arg_names
    compiled: Any = None

    def launch(grid: tuple[int, ...], **changing: int) -> None:
        nonlocal compiled
        values = [changing[name] if name in changing else arguments[name] for name in names]
        if compiled is None:
            compiled = kernel[grid](*values, **options)  # stays None in Triton's interpreter
        else:
            compiled[(*grid, 1, 1)[:3]](*values)

    return launch
