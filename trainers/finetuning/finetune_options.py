"""The options of fine-tuning that its help shows, without torch or transformers.

`FinetuneConfig` is made of them and of `transformers.TrainingArguments`, whose other options work too
(`hf-wsl finetune --help_all` lists them).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hf_wsl.options import ConfigError, option, part_of

from ..data.data_config import DATA
from ..training_options import PRECISIONS, RECIPES, TrainingOptions


RESULT_FILE = "finetuning.json"


@dataclass(unsafe_hash=True)  # what opens a comparison is hashed, these options with it
class FinetuneOptions(TrainingOptions):
    """How a model is fine-tuned. The defaults are the paper's for classifiers (appendix C.2: Adam 1e-3, five epochs).

    Raises:
        ValueError: a value that cannot work; the message names the option.
    """

    num_train_epochs: float = option(5, "passes over the training examples; 0 only measures", was=("epochs",))
    max_steps: int | None = option(None, "optimizer steps, over `num_train_epochs`")
    per_device_train_batch_size: int = option(
        64, "examples per process and forward pass; --batch_size is the same", also=("batch_size",)
    )
    gradient_accumulation_steps: int = option(
        1, "forward passes per optimizer step; the step is that of their joint mean", was=("gradient_accumulation",)
    )
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    weight_decay: float = option(0.0, "decoupled, on matrices and kernels; 0 makes AdamW Adam")
    max_grad_norm: float = option(0.0, "clip the norm of the gradient; 0 = off")
    lr_scheduler_type: str = option(
        "constant",
        "shape of the learning rate over the run: onecycle, or a schedule of TrainingArguments (constant, cosine …)",
        was=("schedule",),
    )
    warmup_steps: float = option(
        0.3, "steps in which the learning rate rises, if it does; below 1 a share of all", was=("warmup_fraction",)
    )
    precision: str = option(
        "float32",
        "arithmetic of the forward pass; weights stay float32. auto times a product of the model's size in both and "
        "takes the faster",
        choices=PRECISIONS,
        was=("mixed_precision",),
    )
    eval_steps: int | None = option(None, "measure every so many steps, and at the end; none: after every epoch")
    per_device_eval_batch_size: int = option(256, "validation examples per forward pass", was=("eval_batch_size",))
    eval_batches: int | None = option(
        None, "forward passes per measurement, on evenly spaced validation examples, always the same; none: all"
    )
    logging_steps: int = option(50, "steps between two lines of the training loss in the trackers")
    dataloader_num_workers: int = option(
        0,
        "processes that load training examples for each training process; --num_workers is the same",
        also=("num_workers",),
    )
    seed: int = option(0, "of the data order, the augmentations, dropout and stochastic depth")
    use_cpu: bool = option(False, "stay on the CPU where a GPU is present")

    def __post_init__(self):
        at_least = {"num_train_epochs": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        at_least |= {"per_device_eval_batch_size": 1, "logging_steps": 1, "max_grad_norm": 0, "weight_decay": 0}
        at_least |= {"max_steps": 1, "eval_steps": 1, "eval_batches": 1, "dataloader_num_workers": 0, "seed": 0}
        at_least |= {"warmup_steps": 0}
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:  # NaN is not
                raise ValueError(f"{name} is {value}; it must be at least {lowest}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not known; choose {', '.join(PRECISIONS)}.")

    def to_dict(self) -> dict[str, Any]:
        """The options by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(FinetuneOptions)}
        return {name: getattr(value, "value", value) for name, value in values.items()}


@dataclass
class FinetuneCommandOptions(FinetuneOptions):
    """What is trained on what, and where the result goes."""

    EXAMPLE = "hf-wsl finetune --model generated/000 --data.images cifar10 --output_dir out"
    RECIPES = RECIPES

    precision: str = option(
        "auto",
        "arithmetic of the forward pass; weights stay float32. auto times a product of the model's size in both and "
        "takes the faster",
        choices=PRECISIONS,
        was=("mixed_precision",),
    )
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
    report_to: list = option([], "trackers, comma-separated: tensorboard, trackio, wandb …")

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
    def training(self) -> FinetuneOptions:
        return part_of(self, FinetuneOptions)
