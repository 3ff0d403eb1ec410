"""Models to rows of numbers: by a backbone, or by the methods that a backbone must beat."""

import importlib
from typing import Any


_MODULES = {  # imported on demand: the options of `hf-wsl embed` are read without torch
    "METHODS": "embed_config",
    "EmbedConfig": "embed_config",
    "EmbedReport": "embed_models",
    "EmbeddingTable": "embedding_table",
    "backbone_state": "embed_models",
    "embed": "embed_models",
    "embed_like": "embed_models",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
