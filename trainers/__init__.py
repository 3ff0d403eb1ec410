"""Training of backbones and of generated models, on `transformers.Trainer`. Names are imported when they are used."""

import importlib
from typing import Any


_NAMES = {
    "FinetuneConfig": "finetuning.finetune_config",
    "FinetuneTrainer": "finetuning.finetune_trainer",
    "PretrainConfig": "pretraining.pretrain_config",
    "PretrainTrainer": "pretraining.pretrain_trainer",
    "WindowCollator": "data.windows.window_inputs",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
