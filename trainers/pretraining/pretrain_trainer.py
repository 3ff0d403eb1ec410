"""`PretrainTrainer`: `transformers.Trainer` for backbones.

One optimizer step is one mean over all its weights, however its windows are split over passes and processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from transformers import FeatureExtractionMixin, TrainerCallback

from modeling_wsl import WSLForPreTraining

from ..checkpointing import CheckpointStateError
from ..data.windows.crops import steps_for_epochs
from ..data.windows.training_batches import BatchPlan, StoredBatches, TrainingBatches
from ..data.windows.window_data import WindowDataset
from ..data.windows.window_inputs import model_inputs
from ..run_trainer import RunTrainer
from .pretrain_config import PretrainConfig
from .run_log import METRICS_FILE, RunLog, comparison_line, keep_until, say
from .step_sums import StepSums, counted_weights
from .validation import Validation


logger = logging.getLogger(__name__)
# Options that decide what the next step computes; a resumed run that changes one is told so.
_TRAJECTORY = (
    "seed",
    "muon_momentum",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "warmup_steps",
    "precision",
    "streaming",
    "shuffle_buffer",
    "crops_per_window",
)


class PretrainTrainer(RunTrainer):
    """Trains `WSLForPreTraining` on crops of tokenized models.

    Example:
        windows = load_dataset("org/tokens", "windows")
        trainer = PretrainTrainer(model, PretrainConfig(output_dir="out"), windows["train"], windows["validation"])
        trainer.train()

    Args:
        model: float32.
        args: the run's options.
        train_dataset: rows of the config `windows`, a `WindowDataset` of them, or what reads a stream.
        eval_dataset: rows of the config `windows`, or a `WindowDataset`; None trains without evaluation.
        processing_class: the dataset's feature extractor, saved beside every checkpoint.
        baselines: R2 of the reference lines, by name; shown beside the model's.
        dataset_commit: of a dataset on the Hub, kept in the checkpoints.
        callbacks: of transformers.

    Attributes:
        tokens_seen: tokens that the run has trained on.
        r2_history: `{"step": ..., "val_r2": ...}` of each evaluation.

    Raises:
        ConfigError: Muon where the model lies in parts, a distribution that training cannot run on.
    """

    # They name folders of this machine.
    not_uploaded = (METRICS_FILE, "training_facts.json", "pretrain_config.yaml")

    def __init__(
        self,
        model: WSLForPreTraining,
        args: PretrainConfig,
        train_dataset: TrainingBatches | WindowDataset | datasets.Dataset,
        eval_dataset: WindowDataset | datasets.Dataset | None = None,
        processing_class: FeatureExtractionMixin | None = None,
        *,
        baselines: dict[str, float] | None = None,
        dataset_commit: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(train_dataset, datasets.Dataset):
            train_dataset = WindowDataset(train_dataset, pad_to=model.config.window_size)
        if isinstance(train_dataset, WindowDataset):
            train_dataset = StoredBatches(train_dataset)
        if isinstance(eval_dataset, datasets.Dataset):
            eval_dataset = WindowDataset(eval_dataset, split="validation")
        self.baselines, self.dataset_commit = dict(baselines or {}), dataset_commit
        self.tokens_seen = 0
        self.r2_history: list[dict[str, float]] = []
        passes = args.gradient_accumulation_steps * args.world_size
        self.windows_per_step = args.per_device_train_batch_size * passes
        self.total_steps = args.max_steps or steps_for_epochs(
            train_dataset.size.windows, self.windows_per_step, args.num_train_epochs
        )
        config = model.config
        # Two equal views with nothing to contrast would be the same forward pass twice.
        self._make_views = config.noise_std > 0 or config.mask_ratio > 0 or config.contrastive_weight > 0
        if config.contrastive_weight == 0:
            # Without a gradient the head would stall the reduction between processes.
            model.projection.requires_grad_(False)
        self.num_parameters = model.num_parameters()
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[RunLog(), *(callbacks or [])],
        )
        self.config = config  # under FSDP2 the model becomes another one
        self._sums = StepSums(self.accelerator)
        self._steps_logged = 0
        self._counts: list[torch.Tensor] = []
        self.validation = None
        if eval_dataset is not None:
            self.validation = Validation(
                self.accelerator,
                eval_dataset,
                config.window_size,
                args.per_device_eval_batch_size,
                args.max_eval_windows,
            )

    # Data

    def batches_from(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        args, config = self.args, self.config
        plan = BatchPlan(
            window_size=config.window_size,
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=args.seed,
            num_workers=args.dataloader_num_workers,
            buffer_size=args.shuffle_buffer,
            crops_per_window=args.crops_per_window,
            max_positions=config.max_positions if config.position_encoding == "learned" else None,
        )
        last = min(self.total_steps, args.stop_at_step or self.total_steps)
        return self.train_dataset.batches(plan, step, last)

    def prepare_pass(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return model_inputs(batch, self.accelerator.device) | {"num_tokens": int((batch["valid_entries"] > 0).sum())}

    def epoch_of(self, step: int) -> float:
        return step * self.windows_per_step / self.train_dataset.size.windows

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """The weights that the step's reconstruction loss averages over, on all processes (Trainer counts labels)."""
        if len(batch_samples) == 1 and self.accelerator.num_processes == 1:
            self._counts = [torch.ones((), device=device)]
            return self._counts[0]
        self._counts = [counted_weights(self.config, inputs) for inputs in batch_samples]
        return self.accelerator.reduce(torch.stack(self._counts).sum(), "sum").clamp(min=1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        inputs = dict(inputs)
        tokens = inputs.pop("num_tokens", 0)
        if num_items_in_batch is None:  # called by somebody else than the loop
            output = model(**inputs)
            return (output.loss, output) if return_outputs else output.loss
        number = self.seed_pass()
        output = model(**inputs, make_views=self._make_views)
        share = (self._counts[number] / num_items_in_batch).float()
        processes = self.accelerator.num_processes
        of_windows = 1.0 / (self.args.gradient_accumulation_steps * processes)
        weight = self.config.contrastive_weight
        reconstruction, contrastive = output.loss_reconstruction * share, output.loss_contrastive * of_windows
        loss = (1 - weight) * reconstruction + weight * contrastive
        with torch.no_grad():
            parts = torch.stack([reconstruction, contrastive, output.r2 * of_windows])
            self._sums.add(self.state.global_step + 1, loss, parts, tokens)
        # The gradient becomes the mean over processes; the shares already add up to one over all.
        loss = loss * processes
        return (loss, output) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        views = 2 if self._make_views else 1
        return 6 * views * self.num_parameters * inputs["positions"].shape[:2].numel()

    # Figures

    def begin(self, step: int) -> None:
        if self.is_world_process_zero():
            keep_until(Path(self.args.output_dir) / METRICS_FILE, step)

    def check_losses(self) -> None:
        if (step := self._sums.first_bad_step()) is not None:
            self.fail(f"the loss was not finite at step {step}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means, tokens = self._sums.take(self.state.global_step - self._steps_logged)
            self._steps_logged = self.state.global_step
            self.tokens_seen += tokens
            logs |= {**means, "tokens_seen": self.tokens_seen, "elapsed_s": self.seconds}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """R2 of the model over the validation windows, beside that of the baselines; in the log too.

        Returns:
            `eval_r2`, and each baseline's (`eval_pca_r2`, `eval_random_projection_r2`); {} without validation windows,
            and where the run was asked to stop meanwhile.
        """
        step, began = self.state.global_step, time.monotonic()
        lines = {f"{name.replace(' ', '_').lower()}_r2": value for name, value in self.baselines.items()}
        known = self.r2_history[-1]["val_r2"] if self.r2_history and self.r2_history[-1]["step"] == step else None
        r2 = known
        if self.validation is not None and r2 is None:
            r2 = self.validation.r2(self.model, stopped=lambda: self.stop_request.reason is not None)
        if r2 is None:
            return {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {"r2": r2, **lines}.items()}
        if known is None:
            self.r2_history.append({"step": step, "val_r2": r2})
            self.log(metrics | {"elapsed_s": self.seconds})
            if self.is_world_process_zero():
                say(comparison_line(step, r2, self.baselines))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._sums.pause(time.monotonic() - began)
        return metrics

    # Resuming

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        began = time.monotonic()
        super()._save_checkpoint(model, trial)
        self._sums.pause(time.monotonic() - began)

    def _shape(self) -> dict[str, int]:
        """What fixes the order of the data and the schedule."""
        return {
            "total_steps": self.total_steps,
            "windows_per_step": self.windows_per_step,
            "num_processes": self.accelerator.num_processes,
            "train_windows": self.train_dataset.size.windows,
            "train_tokens": self.train_dataset.size.tokens,
        }

    def run_state(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "shape": self._shape(),
            "tokens_seen": self.tokens_seen,
            "r2_history": self.r2_history,
            "baselines": self.baselines,
            "dataset_commit": self.dataset_commit,
            "config": self.args.to_dict(),
            "stream": gather_object([self.train_dataset.state()]),
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        if "shape" not in state:
            raise CheckpointStateError(f"{self._last_checkpoint} is no checkpoint of pretraining")
        if state["config"]["streaming"] and self.args.streaming:
            self.train_dataset.resume(state["stream"])
        self.tokens_seen, self.r2_history = state["tokens_seen"], state["r2_history"]
        self.baselines = self.baselines or state["baselines"]
        self._steps_logged = state["step"]
        now = self._shape() | {name: getattr(self.args, name) for name in _TRAJECTORY}
        before = state["shape"] | state["config"]
        for name, value in now.items():
            if before.get(name, value) != value:
                # Allowed (more data, a longer run), but no longer the run that was interrupted.
                logger.warning("%s: %s was %s and is %s now", self._last_checkpoint, name, before[name], value)
        if 0 < 60 * self.args.max_minutes <= state["seconds"]:
            logger.warning(
                "%s: the run has taken %.2f minutes and max_minutes is %g: it ends as it is, without another step. "
                "Resumed time counts; to go on, raise --max_minutes",
                self._last_checkpoint,
                state["seconds"] / 60,
                self.args.max_minutes,
            )
