"""Operators of `torch.library` at less cost to the host than `torch.library.custom_op` has: 6 instead of 17 us a call.

A compiled training step calls hundreds of them. What that decorator does at every call, a test does once: outputs share no
memory with inputs.
"""

from collections.abc import Callable
from typing import Any

import torch


def operator(function: Callable[..., Any]) -> Any:
    """`function` as the operator vlmoe::(its name), for any device and without gradients; it changes none of its arguments.

    `torch.library.register_fake` and `register_autograd` take what this returns.
    """
    name = f"vlmoe::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", function)
    return getattr(torch.ops.vlmoe, function.__name__).default


def refuse_second_order() -> None:
    """In a gradient's formula: a gradient of its own would silently be zero.

    Raises:
        RuntimeError: the formula is about to be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("vlmoe's kernels have no second derivatives: leave out create_graph=True")
