"""The pretraining loop: one optimizer step is one mean over all its windows, however they are split.

Reading order: `PretrainTrainer.train`, then `train_step`. Everything that is drawn (order, crops, noise) is seeded by
the step, so a checkpoint needs no state of random generators and a resumed run equals an uninterrupted one bit for
bit.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import FeatureExtractionMixin, PreTrainedModel

from hf_wsl.errors import RunError
from hf_wsl.options import ConfigError

from ..checkpointing import load_optimizer, optimizer_tensors, read_state, save_checkpoint
from ..data.windows.crops import steps_for_epochs
from ..data.windows.training_batches import BatchPlan, TrainingBatches
from ..distribution import all_finite, refuse_muon_in_parts, spread, whole_weights
from ..optimization import SCHEDULES, make_optimizer, set_step
from ..stop_request import StopRequest
from .freed_memory import keep_freed_memory
from .pass_shares import shares_of_passes
from .pretrain_config import PretrainConfig
from .run_log import RunLog, comparison_line
from .step_sums import NAMES, StepSums
from .validation import Validation, all_attended, to_device


logger = logging.getLogger(__name__)
# Options that decide what the next step computes; a resumed run that changes one is told so.
_TRAJECTORY = (
    "seed",
    "optimizer",
    "muon_momentum",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_schedule",
    "warmup_fraction",
    "mixed_precision",
    "streaming",
    "shuffle_buffer",
    "crops_per_window",
)


class NonFiniteLossError(RunError):
    """The loss or a weight became NaN or infinite; the message names the step and the last good checkpoint."""


class PretrainTrainer:
    """Trains `WSLForPreTraining` on crops of tokenized models.

    Args:
        config: the run's options.
        accelerator: decides device, processes and autocast; see `check_distribution`.
        model: on any device; float32.
        train: training windows.
        validation: None trains without evaluation.
        feature_extractor: saved beside every checkpoint.
        baselines: R2 of the reference lines, by name; shown beside the model's.
        checkpoint: folder to resume from.
        dataset_commit: of a dataset on the Hub, kept in the checkpoints.

    Raises:
        ConfigError: processes that do not see one output_dir; Muon where the model lies in parts.
        CheckpointStateError: a checkpoint that does not fit the model.
    """

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        model: PreTrainedModel,
        train: TrainingBatches,
        validation: Validation | None,
        feature_extractor: FeatureExtractionMixin,
        baselines: dict[str, float],
        checkpoint: Path | None = None,
        dataset_commit: str | None = None,
    ) -> None:
        if config.optimizer == "muon":
            refuse_muon_in_parts(accelerator)
        self.config = config
        self.accelerator = accelerator
        self.batches = train
        self.dataset_commit = dataset_commit
        self.validation = validation
        self.feature_extractor = feature_extractor
        self.baselines = baselines
        self.windows_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self.total_steps = config.max_steps or steps_for_epochs(
            train.size.windows, self.windows_per_step, config.epochs
        )
        self.step = 0  # optimizer steps done
        self.tokens_seen = 0
        self.r2_history: list[dict[str, float]] = []
        self._earlier_seconds = 0.0

        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.unwrapped = model.to(accelerator.device)
        augmented = self.unwrapped.config.noise_std > 0 or self.unwrapped.config.mask_ratio > 0
        # Two equal views with nothing to contrast would be the same forward pass twice.
        self._make_views = augmented or self.unwrapped.config.contrastive_weight > 0
        if self.unwrapped.config.contrastive_weight == 0:
            # Without a gradient the head would stall the reduction between processes.
            for name, parameter in self.unwrapped.named_parameters():
                parameter.requires_grad_(not name.startswith("projection"))
        if config.activation_checkpointing:
            # transformers 5.17 has the second name only, version 6 the first only.
            renamed = getattr(self.unwrapped, "activation_checkpointing_enable", None)
            (renamed or self.unwrapped.gradient_checkpointing_enable)()
        if config.torch_compile:
            self.unwrapped.compile()
        self.model, self.optimizer = spread(accelerator, self.unwrapped, make_optimizer(self.unwrapped, config))
        if checkpoint is not None:
            self._resume(checkpoint)
        self._check_agreement()
        self._last_checkpoint = checkpoint
        self._flags: torch.Tensor | None = None
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._sums = StepSums(accelerator)

    @property
    def seconds(self) -> float:
        """Wall time of the run, that of earlier sittings included."""
        return self._earlier_seconds + time.monotonic() - self._started

    def train(self) -> str:
        """Runs to the end of the schedule, to `stop_at_step`, `max_minutes`, or a signal.

        Returns:
            "completed", "out of time", or "interrupted" (to be resumed; a checkpoint is written in every case).

        Raises:
            NonFiniteLossError: the last good checkpoint is left in place.
        """
        self._started = time.monotonic()
        self.log = RunLog(self.accelerator, self.config, self.step, self.total_steps)
        with StopRequest() as self.stop_request:
            try:
                return self._loop()
            finally:
                self.log.close()

    def _loop(self) -> str:
        config = self.config
        last = min(self.total_steps, config.stop_at_step or self.total_steps)
        batches = self.batches.batches(self._plan(), self.step, last)
        if self.step == 0:
            self._evaluate()
        self.unwrapped.train()
        reason = None
        while self.step < last:
            reason = self._reason_to_stop()
            if reason:
                break
            self.train_step([next(batches) for _ in range(config.gradient_accumulation_steps)])
            self.log.advance()
            finished = self.step == self.total_steps
            if finished or self.step % config.logging_steps == 0:
                self._log_metrics()
            if finished or _due(self.step, config.eval_steps):
                self._evaluate()
            if _due(self.step, config.save_steps) and not finished:
                self._save()
        if reason == "max_minutes":
            self._evaluate()
        self._save()
        if self.step == self.total_steps:
            return "completed"
        return "out of time" if reason == "max_minutes" else "interrupted"

    def train_step(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """One optimizer step over the windows of `batches` and those of the other processes.

        Args:
            batches: one a forward pass, on the CPU, as `WindowDataset` reads them.
        """
        config, accelerator = self.config, self.accelerator
        rate, beta1 = SCHEDULES[config.lr_schedule](
            self.step,
            self.total_steps,
            learning_rate=config.learning_rate,
            beta1=config.adam_beta1,
            warmup_fraction=config.warmup_fraction,
        )
        set_step(self.optimizer, rate, beta1)
        inputs = [to_device(batch, accelerator.device) for batch in batches]
        shares = shares_of_passes(accelerator, self.unwrapped.config, inputs)
        weight = self.unwrapped.config.contrastive_weight
        parts = torch.zeros(len(NAMES), device=accelerator.device)
        for micro, (tokens, token_mask, positions) in enumerate(inputs):
            torch.manual_seed(_seed_of(config.seed, self.step, micro, accelerator.process_index))
            last = micro == len(inputs) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    output = self.model(
                        tokens,
                        token_mask=token_mask,
                        positions=positions,
                        attend_all=all_attended(batches[micro]),
                        make_views=self._make_views,
                    )
                contrastive = output.loss_contrastive
                of_windows = 1.0 / (len(inputs) * accelerator.num_processes)
                loss = (1 - weight) * output.loss_reconstruction * shares[micro] + weight * contrastive * of_windows
                # The gradient becomes the mean over processes; the shares already add up to one over all.
                accelerator.backward(loss * accelerator.num_processes)
            with torch.no_grad():
                reconstruction = output.loss_reconstruction * shares[micro]
                parts += torch.stack([loss, reconstruction, contrastive * of_windows, output.r2 * of_windows])
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        tokens = sum(int(torch.count_nonzero(batch["valid_entries"])) for batch in batches)
        self._sums.add(self.step, parts, tokens)

    def _log_metrics(self) -> None:
        """Writes the means since the last line, after making sure that they are finite."""
        if self._sums.steps == 0:
            return
        values, tokens, first_bad = self._sums.take()
        if first_bad is not None:
            self._fail(f"the loss was not finite at step {first_bad}")
        self.tokens_seen += tokens
        values |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "epoch": self.step * self.windows_per_step / self.batches.size.windows,
            "elapsed_s": self.seconds,
        }
        self.log.metrics(self.step, values)

    def _evaluate(self) -> None:
        if self.validation is None or (self.r2_history and self.r2_history[-1]["step"] == self.step):
            return
        began = time.monotonic()
        r2 = self.validation.r2(self.unwrapped, stopped=lambda: self.stop_request.reason is not None)
        if r2 is None:
            return
        self.r2_history.append({"step": self.step, "val_r2": r2})
        lines = {f"{name.replace(' ', '_').lower()}_r2": value for name, value in self.baselines.items()}
        self.log.metrics(self.step, {"val_r2": r2, **lines, "elapsed_s": self.seconds})
        self.log.say(comparison_line(self.step, r2, self.baselines))
        self._sums.pause(time.monotonic() - began)

    def _save(self) -> None:
        """Writes a checkpoint of weights that are known to be finite."""
        folder = Path(self.config.output_dir) / f"checkpoint-{self.step}"
        if self.step == 0 or self._last_checkpoint == folder:
            return  # nothing to keep that is not there already
        self._log_metrics()
        began = time.monotonic()
        if not all_finite(self.accelerator, self.unwrapped.parameters()):
            self._fail(f"a weight was not finite after step {self.step}")
        is_main = self.accelerator.is_main_process
        weights = whole_weights(self.accelerator, self.unwrapped)
        moments = optimizer_tensors(self.unwrapped, self.optimizer, keep=is_main)
        state = self._state() | {"stream": gather_object([self.batches.state()])}
        if is_main:
            save_checkpoint(
                self.config.output_dir,
                self.unwrapped,
                weights,
                moments,
                self.feature_extractor,
                state,
                self.config.save_total_limit,
            )
        self.accelerator.wait_for_everyone()
        self._last_checkpoint = folder
        self._sums.pause(time.monotonic() - began)
        self.log.say(f"step {self.step}: saved {folder}")

    def _fail(self, what: str) -> NoReturn:
        kept = self._last_checkpoint
        resume = (
            f"The last good checkpoint is {kept}; resume from it" if kept else "No checkpoint was written yet; start"
        )
        raise NonFiniteLossError(
            f"{what} (seen at step {self.step}). {resume} with a lower --learning_rate, or with --max_grad_norm 1.0"
        )

    def _reason_to_stop(self) -> str | None:
        """The signal's name, "max_minutes", or None; the same answer on every process."""
        signal = self.stop_request.reason
        late = self.config.max_minutes > 0 and self.seconds >= 60 * self.config.max_minutes
        if self.accelerator.num_processes > 1:
            # Signals reach processes at different times. What they agreed on a step ago is already computed, so
            # reading it does not hold up the device.
            flags = torch.tensor([float(signal is not None), float(late)], device=self.accelerator.device)
            agreed, self._flags = self._flags, self.accelerator.reduce(flags, "sum")
            signalled, late = (False, False) if agreed is None else (value > 0 for value in agreed.tolist())
            signal = (signal or "a signal to another process") if signalled else None
        if signal:
            self.log.say(
                f"step {self.step}: {signal}; saving, then stopping. Go on with --resume_from_checkpoint latest"
            )
            return signal
        return "max_minutes" if late else None

    def _shape(self) -> dict[str, int]:
        """What fixes the order of the data and the schedule."""
        return {
            "total_steps": self.total_steps,
            "windows_per_step": self.windows_per_step,
            "num_processes": self.accelerator.num_processes,
            "train_windows": self.batches.size.windows,
            "train_tokens": self.batches.size.tokens,
        }

    def _plan(self) -> BatchPlan:
        config, model_config = self.config, self.unwrapped.config
        return BatchPlan(
            window_size=model_config.window_size,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=config.seed,
            num_workers=config.num_workers,
            buffer_size=config.shuffle_buffer,
            crops_per_window=config.crops_per_window,
            max_positions=model_config.max_positions if model_config.position_encoding == "learned" else None,
        )

    def _check_agreement(self) -> None:
        """Raises ConfigError where processes start at different steps: a node does not see the checkpoint."""
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ConfigError(
                f"the processes start at different steps {sorted(set(steps))}: output_dir {self.config.output_dir} "
                "must be one folder that all nodes see"
            )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "shape": self._shape(),
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "r2_history": self.r2_history,
            "baselines": self.baselines,
            "dataset_commit": self.dataset_commit,
            "config": self.config.to_dict(),
        }

    def _resume(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        load_optimizer(checkpoint, self.unwrapped, self.optimizer)
        if state["config"].get("streaming") and self.config.streaming:
            self.batches.resume(state["stream"])
        self.step = state["step"]
        self.tokens_seen = state["tokens_seen"]
        self.r2_history = state["r2_history"]
        self._earlier_seconds = state["seconds"]
        now = self._shape() | {name: getattr(self.config, name) for name in _TRAJECTORY}
        before = state["shape"] | state["config"]
        for name, value in now.items():
            if before.get(name, value) != value:
                # Allowed (more data, a longer run), but no longer the run that was interrupted.
                logger.warning("%s: %s was %s and is %s now", checkpoint, name, before[name], value)
        if 0 < 60 * self.config.max_minutes <= self._earlier_seconds:
            logger.warning(
                "%s: the run has taken %.2f minutes and max_minutes is %g: it ends as it is, without another step. "
                "Resumed time counts; to go on, raise --max_minutes",
                checkpoint,
                self._earlier_seconds / 60,
                self.config.max_minutes,
            )


def _seed_of(seed: int, step: int, micro: int, rank: int) -> int:
    """64 bits for the noise of one forward pass."""
    return int(np.random.SeedSequence((seed, step, micro, rank)).generate_state(1, np.uint64)[0])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
