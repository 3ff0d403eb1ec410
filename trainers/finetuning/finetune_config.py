"""Every option of a fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_wsl.options import ConfigError, option, part_of

from ..data.data_config import DATA


SCHEDULES = ("constant", "onecycle")
PRECISIONS = ("no", "bf16")
RECIPES = Path(__file__).parents[1] / "recipes"
RESULT_FILE = "finetuning.json"


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


@dataclass(frozen=True)
class FinetuneCommandConfig(FinetuneConfig):
    """What is trained on what, and where the result goes."""

    EXAMPLE = "hf-wsl finetune --model generated/000 --data.images cifar10 --output_dir out"
    RECIPES = RECIPES

    task: str = option("image-classification", "what is learned", choices=tuple(DATA))
    model: str = option(
        "", "folder of a generated or trained model, or Hub id; with `from_scratch` also a timm or transformers name"
    )
    model_revision: str | None = option(None, "branch, tag or commit of a model on the Hub")
    target_kwargs: dict = option({}, "of the architecture: --target_kwargs.img_size 32, --target_kwargs.n_layer 4")
    from_scratch: bool = option(False, "start from the library's own initialization, drawn from the seed")
    new_head: bool = option(False, "give the model a new classifier with as many classes as the data has")
    data: dict = option({}, "options of the data, images or text by the task", of=tuple(DATA.values()))
    output_dir: str = option("", f"folder of the run: checkpoints, the trained model, {RESULT_FILE}")
    save_steps: int | None = option(None, "optimizer steps between checkpoints; none: at every measurement")

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"option '{name}' is needed")
        if self.save_steps is not None and self.save_steps < 1:
            raise ConfigError(f"option 'save_steps' is {self.save_steps}; it must be at least 1")
        if self.from_scratch and self.new_head:
            raise ConfigError("option 'new_head': a model from scratch has a new head in any case; leave it out")

    @property
    def training(self) -> FinetuneConfig:
        return part_of(self, FinetuneConfig)
