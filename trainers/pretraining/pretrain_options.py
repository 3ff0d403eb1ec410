"""The options of the pretraining command that its help shows, without torch or transformers.

`PretrainConfig` is made of them and of `transformers.TrainingArguments`, whose other options work too
(`hf-wsl pretrain --help_all` lists them).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import yaml

from hf_wsl.options import ConfigError, option

from ..training_options import PRECISIONS, RECIPES, TrainingOptions


_POSITIVE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "logging_steps",
    "save_total_limit",
    "shuffle_buffer",
    "crops_per_window",
)


@dataclass
class PretrainOptions(TrainingOptions):
    """What a pretraining run is made of. Raises ConfigError on values that cannot work, naming the option.

    The optimizer's defaults are the paper's (Table 4: AdamW 2e-5, weight decay 3e-9, OneCycle); recipes set the rest.
    """

    RECIPES = RECIPES
    EXAMPLE = "hf-wsl pretrain --config tiny --dataset DIR --output_dir OUT --max_minutes 30"

    dataset: str = option(
        "", "tokenized dataset: a folder written by `hf-wsl tokenize`, or a dataset id on the Hub", group="data"
    )
    dataset_revision: str | None = option(
        None, "branch, tag or commit of a dataset on the Hub; a resumed run stays at the commit that it began with"
    )
    streaming: bool = option(
        False,
        "read training windows as they are used, for datasets larger than the disk; a thread decodes some hundred "
        "windows a second, so a fast device wants `num_workers`",
    )
    shuffle_buffer: int = option(1024, "crops that a process holds and shuffles when streaming, twice over")
    crops_per_window: int = option(
        1,
        "crops taken of a window each time it is read when streaming: so many visits for one download; crops of one "
        "window come close together",
    )
    output_dir: str = option(
        "", "folder of the run: checkpoints, metrics.jsonl, the trained model, training_facts.json"
    )
    size: str = option(
        "tiny", "size of the backbone (WSLConfig.from_size): nano, tiny, hf-small, hf-large, sane", group="model"
    )
    model: dict = option({}, "any field of WSLConfig, over the size: --model.loss_normalization token")
    model_name_or_path: str | None = option(
        None, "start from the weights and config of this backbone, a folder or a Hub id, instead of from `size`"
    )
    model_revision: str | None = option(None, "branch, tag or commit of `model_name_or_path` on the Hub")
    attn_implementation: str | None = option(None, "attention kernel: sdpa, eager, flash_attention_2 …")
    torch_compile: bool = option(False, "compile the model; pays off on a GPU after some minutes")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    num_train_epochs: float = option(
        1.0, "visits to every window; one visit is one crop of window_size tokens", group="length", was=("epochs",)
    )
    max_steps: int = option(0, "optimizer steps, over `num_train_epochs`; 0 or -1 = by epochs")
    max_minutes: float = option(0.0, "stop (evaluated and saved) after this wall time, resumed time included; 0 = off")
    stop_at_step: int = option(0, "save and leave at this step with the schedule unchanged, to be resumed; 0 = off")
    per_device_train_batch_size: int = option(
        64, "windows per process and forward pass; --batch_size is the same", group="optimizer", also=("batch_size",)
    )
    gradient_accumulation_steps: int = option(
        1,
        "forward passes per optimizer step, whose gradient is that of the mean over all their weights; only "
        "loss_normalization=batch and the contrastive loss still see one pass at a time",
    )
    global_batch_size: int = option(
        0,
        "windows per optimizer step over all processes; the batch size is lowered and gradient_accumulation_steps set "
        "to come to it, so that a recipe trains the same on any number of processes; 0 = off",
    )
    optim: str = option(
        "adamw_torch_fused",
        "any optimizer of TrainingArguments, or muon: Muon on the matrices of the blocks, AdamW on the rest, at one "
        "learning rate as in arXiv 2502.16982",
        was=("optimizer",),
    )
    muon_momentum: float = option(0.95, "Muon's momentum (Nesterov's); the schedule leaves it as it is")
    learning_rate: float = option(2e-5, "peak learning rate")
    weight_decay: float = option(3e-9, "decoupled weight decay, on matrices only")
    adam_beta1: float = option(0.95, "AdamW beta1; OneCycle moves it down to 0.85 at the peak and back")
    adam_beta2: float = option(0.999, "AdamW beta2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(0.0, "clip the norm of the gradient; 0 = off")
    lr_scheduler_type: str = option(
        "onecycle",
        "shape of the learning rate: onecycle, or a schedule of TrainingArguments (cosine, linear …)",
        was=("lr_schedule",),
    )
    warmup_steps: float = option(
        0.3, "steps in which the learning rate rises; below 1 a share of all steps", was=("warmup_fraction",)
    )
    precision: str = option(
        "auto",
        "arithmetic of the forward pass; weights stay float32. auto times a product of the model's size in both and "
        "takes the faster",
        choices=PRECISIONS,
        group="precision and chance",
        was=("mixed_precision",),
    )
    seed: int = option(0, "seed of everything drawn: weights, crops, order, noise")
    deterministic: bool = option(
        True, "deterministic kernels: the same bytes on the same machine; costs some speed on GPUs"
    )
    use_cpu: bool = option(False, "stay on the CPU where a GPU is present")
    dataloader_num_workers: int = option(
        0, "threads that read ahead; the crops do not depend on it; --num_workers is the same", also=("num_workers",)
    )
    logging_steps: float = option(10, "steps between two lines of metrics (also the check for NaN)", group="watching")
    eval_steps: float = option(0, "steps between two evaluations; 0 = at the first and last step only")
    per_device_eval_batch_size: int = option(
        0, "windows per forward pass in evaluation; 0 = as in training", was=("eval_batch_size",)
    )
    max_eval_windows: int = option(0, "evaluate on this many validation windows only, evenly spaced; 0 = all")
    baseline_tokens: int = option(500_000, "training tokens that PCA is fitted on, evenly spaced; 0 = no baselines")
    report_to: list = option([], "trackers, comma-separated, beside metrics.jsonl: tensorboard, trackio, wandb …")
    run_name: str = option("hf-wsl-pretrain", "name of the run in the trackers")
    save_steps: float = option(0, "steps between two checkpoints; 0 = at the end only", group="keeping")
    save_total_limit: int = option(2, "checkpoints kept, newest first")
    save_dtype: str = option("float32", "dtype of the finished model", choices=("float32", "bfloat16", "float16"))
    resume_from_checkpoint: str | None = option(None, "`latest`, or the folder of a checkpoint")
    overwrite_output_dir: bool = option(
        False, "delete an earlier run in output_dir (checkpoints and finished model) and start over"
    )
    push_to_hub: bool = option(False, "upload checkpoints and the finished model to the Hub")
    hub_model_id: str | None = option(None, "repository of push_to_hub; by default the name of output_dir")
    deepspeed: str | None = option(None, "DeepSpeed's configuration, a JSON file or JSON text")

    def __post_init__(self) -> None:
        if self.max_steps == -1:
            self.max_steps = 0
        for name in _POSITIVE:
            if not getattr(self, name) > 0:  # NaN is not
                raise ConfigError(f"option '{name}' must be above 0, not {getattr(self, name)}")
        for field in dataclasses.fields(PretrainOptions):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < math.inf:
                raise ConfigError(f"option '{field.name}' must not be negative or infinite, not {value}")
            if isinstance(value, float) and field.name.endswith("_steps") and value == int(value):
                setattr(self, field.name, int(value))
        if self.max_steps == 0 and self.num_train_epochs == 0:
            raise ConfigError("option 'num_train_epochs' is 0 and so is 'max_steps': set one of them")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"option '{name}' must be in [0, 1), not {getattr(self, name)}")
        if self.crops_per_window > 1 and not self.streaming:
            raise ConfigError("option 'crops_per_window' is for streams: add --streaming, or leave it at 1")

    def require_paths(self) -> None:
        """Raises ConfigError unless the dataset and the output folder were given."""
        for name in ("dataset", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"option '{name}' is missing: --{name} …")

    def to_dict(self) -> dict[str, Any]:
        """The options of the help by name, and others of TrainingArguments that were given; no tokens."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(PretrainOptions)}
        return {name: getattr(value, "value", value) for name, value in values.items()} | getattr(self, "more", {})

    def to_yaml(self) -> str:
        """The resolved options as YAML that `--config` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
