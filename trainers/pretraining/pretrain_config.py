"""`PretrainConfig`: TrainingArguments with the options of pretraining."""

from __future__ import annotations

from dataclasses import dataclass

from hf_wsl.options import ConfigError
from modeling_wsl.configuration_wsl import SIZES, WSLConfig

from ..run_arguments import RunArguments
from .pretrain_options import PretrainOptions


@dataclass(repr=False)
class PretrainConfig(PretrainOptions, RunArguments):
    """`transformers.TrainingArguments` for `PretrainTrainer`: the options of `PretrainOptions` with their defaults,
    and every other one of TrainingArguments. Making one sets up the device and the processes, as these do.

    Attributes:
        precision: "auto" has become "float32" or "bfloat16", by what this machine multiplies faster.

    Raises:
        ConfigError: a value that cannot work, a tracker or DeepSpeed that is not installed, a `global_batch_size` that
            the processes cannot share.
    """

    def __post_init__(self) -> None:
        PretrainOptions.__post_init__(self)
        size = SIZES.get(self.size, {})  # another one is refused when the model is made
        width = self.model.get("hidden_size", size.get("hidden_size", WSLConfig.hidden_size))
        self.prepare_arguments(width, rows=self.per_device_train_batch_size * 512)
        self.per_device_eval_batch_size = self.per_device_eval_batch_size or self.per_device_train_batch_size
        self._share_global_batch()

    def _share_global_batch(self) -> None:
        """Sets batch size and accumulation to what comes to `global_batch_size` on these processes."""
        if self.global_batch_size == 0:
            return
        share, rest = divmod(self.global_batch_size, self.world_size)
        batch_size = min(self.per_device_train_batch_size, share)
        if rest or share == 0 or share % batch_size:
            raise ConfigError(
                f"option 'global_batch_size' is {self.global_batch_size}, which {self.world_size} process(es) cannot "
                f"share in passes of {self.per_device_train_batch_size} windows or all at once. Choose a batch_size "
                "that divides it, or --global_batch_size 0"
            )
        self.per_device_train_batch_size, self.gradient_accumulation_steps = batch_size, share // batch_size
