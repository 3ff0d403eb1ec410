"""What both trainings add to `transformers.TrainingArguments`."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, field

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils.generic import ExplicitEnum
from transformers.utils.logging import is_progress_bar_enabled

from hf_wsl.options import ConfigError, nearest
from modeling_wsl.backbone.precision import choose_precision


logger = logging.getLogger(__name__)
_SETUP = "trainers/accelerate/fsdp2_8_gpus.yaml"


class OwnName(ExplicitEnum):
    """A schedule and an optimizer that TrainingArguments does not know, spelled as its own names are."""

    ONE_CYCLE = "onecycle"
    MUON = "muon"


ONE_CYCLE, MUON = OwnName


@dataclass(repr=False)
class RunArguments(TrainingArguments):
    """TrainingArguments with a precision that the machine decides, the schedule `onecycle`, the optimizer `muon`, and
    the defaults that our loops need. Subclasses call `prepare_arguments` instead of `TrainingArguments.__post_init__`.
    """

    precision: str = "auto"
    # A check for NaN at each pass would make a GPU wait; the loop looks when it logs.
    logging_nan_inf_filter: bool = False
    # The loader begins where the run stopped.
    ignore_data_skip: bool = True
    # Every parameter that is trained gets a gradient.
    ddp_find_unused_parameters: bool | None = False
    report_to: None | str | list[str] = field(default_factory=list)

    def prepare_arguments(self, width: int | None, rows: int = 2048) -> None:
        """Resolves what TrainingArguments does not know, then lets it check and set up the rest.

        Args:
            width: of the matrices that `precision: auto` times; None: it is float32.
            rows: rows of the products.

        Raises:
            ConfigError: an option that this machine or these packages cannot have.
        """
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.disable_tqdm is None:
            self.disable_tqdm = not is_progress_bar_enabled()
        if self.eval_steps and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        self._check_packages()
        timed = {}
        if self.precision == "auto" and width is not None:
            device = "cpu" if self.use_cpu else torch.accelerator.current_accelerator().type
            self.precision, timed = choose_precision(device, width, min(rows, 2048))
        elif self.precision == "auto":
            self.precision = "float32"
        # TrainingArguments refuses names that are not its own.
        own = {"lr_scheduler_type": (ONE_CYCLE, "constant"), "optim": (MUON, "adamw_torch")}
        asked = {name: getattr(self, name) for name, (value, _) in own.items() if getattr(self, name) == value}
        for name in asked:
            setattr(self, name, own[name][1])
        self.bf16 = self.precision == "bfloat16" and not timed  # what was timed works, and processes must agree first
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"transformers refuses these options: {error}") from error
        for name, value in asked.items():
            setattr(self, name, OwnName(value))
        agreed = [self.precision]
        broadcast_object_list(agreed)
        self.precision = agreed[0]
        self.bf16 = self.precision == "bfloat16"
        self.mixed_precision = "bf16" if self.bf16 else "no"
        self._n_gpu = min(self._n_gpu, 1)  # several GPUs take as many processes: DataParallel would split a loss
        if timed and self.process_index == 0:
            milliseconds = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in timed.items())
            logger.info("precision: %s (one product of the model's width: %s)", self.precision, milliseconds)

    def _check_packages(self) -> None:
        asked_of_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if (self.deepspeed or asked_of_accelerate) and importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                "option 'deepspeed': the package is not installed. Run `pip install deepspeed`, or shard with FSDP2, "
                f"which needs no package: {_SETUP}"
            )
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        self.report_to = [name for name in names if name != "none"]
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK and name != "all":
                raise ConfigError(
                    f"option 'report_to' names '{name}', which transformers does not report to."
                    f"{nearest(name, INTEGRATION_TO_CALLBACK)}"
                )
            if name != "all" and name not in get_available_reporting_integrations():
                raise ConfigError(
                    f"option 'report_to': {name} is not installed. Run `pip install {name}`, or leave it out"
                )
