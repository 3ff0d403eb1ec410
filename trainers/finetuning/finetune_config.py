"""Every option of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass

from hf_wsl.options import option


SCHEDULES = ("constant", "onecycle")
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class FinetuneConfig:
    """How a model is fine-tuned. The defaults are the paper's for classifiers (appendix C.2: Adam 1e-3, five epochs).

    Raises:
        ValueError: a value that cannot work; the message names the option.
    """

    epochs: int = option(5, "passes over the training examples; 0 only measures")
    max_steps: int | None = option(None, "optimizer steps, over `epochs`")
    batch_size: int = option(64, "examples per process and forward pass")
    gradient_accumulation: int = option(1, "forward passes per optimizer step; the step is that of their joint mean")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    weight_decay: float = option(0.0, "decoupled, on matrices and kernels; 0 makes AdamW Adam")
    schedule: str = option("constant", "shape of the learning rate over the run", choices=SCHEDULES)
    warmup_fraction: float = option(0.3, "part of a onecycle run in which the learning rate rises")
    mixed_precision: str = option("no", "autocast, as in Accelerate", choices=PRECISIONS)
    eval_steps: int | None = option(None, "measure every so many steps, and at the end; none: after every epoch")
    eval_batch_size: int = option(256, "validation examples per forward pass")
    eval_batches: int | None = option(
        None, "forward passes per measurement, on evenly spaced validation examples, always the same; none: all"
    )
    num_workers: int = option(0, "processes that load training examples for each training process")
    seed: int = option(0, "of the data order, the augmentations, dropout and stochastic depth")
    use_cpu: bool = option(False, "stay on the CPU where a GPU is present")

    def __post_init__(self):
        at_least = {"epochs": 0, "batch_size": 1, "gradient_accumulation": 1, "eval_batch_size": 1}
        at_least |= {"max_steps": 1, "eval_steps": 1, "eval_batches": 1, "num_workers": 0, "seed": 0}
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} is {value}; it must be at least {lowest}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must not be negative.")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction is {self.warmup_fraction}; it must be in [0, 1).")
        for name, known in (("schedule", SCHEDULES), ("mixed_precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known; choose {' or '.join(map(repr, known))}."
                )
