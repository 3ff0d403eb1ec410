"""`FinetuneConfig`: TrainingArguments with the options of fine-tuning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling_wsl.backbone.precision import choose_precision

from ..run_arguments import ONE_CYCLE, RunArguments
from .finetune_options import FinetuneOptions


_ADAM_BETA1, _ONE_CYCLE_BETA1 = 0.9, 0.95  # of Adam, and of torch's OneCycleLR


@dataclass(repr=False)
class FinetuneConfig(FinetuneOptions, RunArguments):
    """`transformers.TrainingArguments` for `FinetuneTrainer`: the options of `FinetuneOptions` with their defaults,
    and every other one of TrainingArguments. Making one sets up the device and the processes.
    """

    save_total_limit: int | None = 1

    def __post_init__(self) -> None:
        FinetuneOptions.__post_init__(self)
        self.max_steps = self.max_steps or 0
        if self.lr_scheduler_type == ONE_CYCLE and self.adam_beta1 == _ADAM_BETA1:
            self.adam_beta1 = _ONE_CYCLE_BETA1
        self.prepare_arguments(width=None)

    @classmethod
    def of(cls, options: FinetuneOptions, model: nn.Module, **more: Any) -> FinetuneConfig:
        """The arguments for these options; `precision: auto` times a product of the model's widest matrix.

        Args:
            more: over the options.
        """
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in values.items() if name in names} | more
        if values["precision"] == "auto":
            device = "cpu"
            if torch.accelerator.is_available() and not options.use_cpu:
                device = torch.accelerator.current_accelerator().type
            width = max((p.shape[-1] for p in model.parameters() if p.ndim == 2), default=256)
            values["precision"], _ = choose_precision(device, width)
        return cls(**values)
