"""Operators of `torch.library` at less cost to the host than `torch.library.custom_op` has: 6 instead of 17 us a call.

A compiled training step calls hundreds of them. What that decorator does at every call, a test does once: outputs share no
memory with inputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def operator(function: Callable[..., Any]) -> Any:
    """`function` as the operator vlmoe::(its name), for any device and without gradients; it changes none of its arguments.

    It runs on the device of its first argument, a tensor: Triton launches on the current one.
    `torch.library.register_fake` and `register_autograd` take what this returns.
    """

    @functools.wraps(function)
    def on_its_device(*arguments: Any) -> Any:
        index = arguments[0].get_device()  # -1: a CPU
        if index < 0 or index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(index):
            return function(*arguments)

    name = f"vlmoe::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", on_its_device)
    return getattr(torch.ops.vlmoe, function.__name__).default


def aligned(tensor: Tensor) -> Tensor:
    """Rows side by side from a multiple of 16 bytes on, which asynchronous copies count on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def refuse_second_order() -> None:
    """In a gradient's formula: a gradient of its own would silently be zero.

    Raises:
        RuntimeError: the formula is about to be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("vlmoe's kernels have no second derivatives: leave out create_graph=True")
