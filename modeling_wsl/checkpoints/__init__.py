"""Reading weights from everywhere: files, folders, Hub ids, objects in memory."""

import importlib
from typing import Any


_MODULES = {  # on demand: a module of this package must not need torch because another does
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "NonFiniteWeightsError": "errors",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
