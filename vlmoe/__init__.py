"""BEiT-3-style vision-language pretraining with multi-head mixture-of-experts layers."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`vlmoe.load` and `vlmoe.Model` bring torch with them, so they are imported when they are first used."""
    if name in ("load", "Model"):
        return getattr(import_module("vlmoe.use"), name)
    raise AttributeError(f"module 'vlmoe' has no attribute {name!r}")
