"""`RunTrainer`: what pretraining and fine-tuning have in common beyond `transformers.Trainer`.

A run is one row of optimizer steps, and all that is drawn (order, augmentation, noise, dropout) is a function of the
seed and the step. So a checkpoint needs no state of random generators, and a resumed run equals an uninterrupted
one bit for bit. Checkpoints hold no pickles and appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from hf_wsl.errors import RunError
from hf_wsl.files import remove_leftovers, write_json
from hf_wsl.options import ConfigError

from .checkpointing import (
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointStateError,
    last_checkpoint,
    load_optimizer,
    load_weights,
    new_checkpoint,
    optimizer_tensors,
    read_state,
    save_model,
)
from .distribution import all_finite, check_distribution, is_sharded, refuse_muon_in_parts
from .optimization import OneCycle, move_to_step, muon_with_adamw, schedule_state
from .run_arguments import MUON, ONE_CYCLE
from .stop_request import StopRequest


logger = logging.getLogger(__name__)
COMPLETED, OUT_OF_TIME, INTERRUPTED = "completed", "out of time", "interrupted"


class NonFiniteLossError(RunError, FloatingPointError):
    """The loss or a weight became NaN or infinite; the message names the step and the last good checkpoint."""


class StepLoader:
    """What `Trainer` takes for its data loader: the batches from the step on that the run is at.

    Args:
        trainer: whose `batches_from(step)` gives them.
        length: batches of the whole run.
    """

    def __init__(self, trainer: RunTrainer, length: int) -> None:
        self.trainer, self.length = trainer, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return self.trainer.batches_from(self.trainer.state.global_step)


class RunTrainer(Trainer):
    """Base of `PretrainTrainer` and `FinetuneTrainer`; see the top of this file.

    Subclasses set `total_steps` before `super().__init__`, and override `batches_from`, `compute_loss`, `evaluate`,
    `epoch_of`, `run_state` and `load_run_state`.

    Attributes:
        status: after `train`: "completed", "out of time" or "interrupted" (to be resumed).
        seconds: wall time of the run, that of earlier sittings included.
    """

    loss_is_scaled_for_ga = True
    keep_checkpoints = True
    not_uploaded: tuple[str, ...] = ()  # files of output_dir that push_to_hub leaves here
    total_steps: int

    def __init__(self, *arguments: Any, callbacks: list[TrainerCallback] | None = None, **options: Any) -> None:
        config = getattr(options.get("model", arguments[0] if arguments else None), "config", None)
        use_cache = getattr(config, "use_cache", None)
        super().__init__(*arguments, callbacks=[_Flow(self), *(callbacks or [])], **options)
        self.remove_callback(PrinterCallback)  # the log has the same line in words
        if use_cache is not None:  # Trainer has written its own into the model's config
            config.use_cache = use_cache
        elif hasattr(config, "use_cache"):
            del config.use_cache
        self.stop_request = StopRequest()
        self.status = INTERRUPTED
        self._earlier_seconds, self._began = 0.0, time.monotonic()
        self._last_checkpoint: Path | None = None
        self._flags: torch.Tensor | None = None
        self._pass = 0

    # What subclasses give

    def batches_from(self, step: int) -> Iterator[Any]:
        """The batches of this process from a step on, one a forward pass."""
        raise NotImplementedError

    def prepare_pass(self, batch: Any) -> Any:
        """A batch as the model takes it, on the device."""
        return self._prepare_inputs(batch)

    def epoch_of(self, step: int) -> float:
        """Passes over the data after so many steps."""
        raise NotImplementedError

    def run_state(self) -> dict[str, Any]:
        """JSON content that a checkpoint keeps beside Trainer's own state. Every process calls it."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Takes up what `run_state` gave."""

    def begin(self, step: int) -> None:
        """Called before the first step of a sitting; `step` steps were made in earlier ones."""

    def check_losses(self) -> None:
        """Calls `fail` where a loss since the last call was not finite. Every process calls it."""

    # The loop

    @property
    def seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._began

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput:
        """`Trainer.train`; stops with a checkpoint on SIGTERM, Ctrl+C, `stop_at_step` and `max_minutes`.

        Raises:
            CheckpointStateError: a checkpoint that does not fit the model or the options.
            NonFiniteLossError: the last good checkpoint is left in place.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
        if checkpoint and not self.is_deepspeed_enabled:
            # Before the model is laid on the processes, so that it is the whole one.
            state = read_state(Path(checkpoint))
            if state["optim"] != str(_plain(self.args.optim)):
                raise CheckpointStateError(
                    f"{checkpoint} was trained with {state['optim']}, and the option 'optim' has changed to "
                    f"{_plain(self.args.optim)}: its optimizer's state does not fit"
                )
            load_weights(Path(checkpoint), self.model)
            self._earlier_seconds = state.get("seconds", 0.0)
            self._last_checkpoint = Path(checkpoint)
            self.load_run_state(state)
        if self.keep_checkpoints and self.args.should_save:
            remove_leftovers(Path(self.args.output_dir))  # of a process that was killed while it saved
        self._check_agreement(0 if not checkpoint else read_state(Path(checkpoint))["step"])
        with self.stop_request if self.keep_checkpoints else contextlib.nullcontext():
            try:
                output = super().train(str(checkpoint) if checkpoint else None, **options)
            except BaseException:
                for callback in self.callback_handler.callbacks:  # the error's line must not follow upon half a bar
                    if (bar := getattr(callback, "training_bar", None)) is not None:
                        bar.close()
                raise
        if self.state.global_step >= self.total_steps:
            self.status = COMPLETED
        return output

    def get_train_dataloader(self) -> StepLoader:
        return StepLoader(self, self.total_steps * self.args.gradient_accumulation_steps)

    def set_initial_training_values(self, args: Any, dataloader: StepLoader) -> tuple[int, ...]:
        size, total = self.get_total_train_batch_size(args), self.total_steps
        # One epoch of Trainer is the whole run: its batches are full, and a step may reach into the next pass.
        return 1, total, len(self.train_dataset), total * size, size, total * args.gradient_accumulation_steps, total

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        found = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)  # of now: a checkpoint's state has those of its run
        return found

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | None]:
        """The passes of a step, on the device, and what their shares are of; none where the run is to stop."""
        reason = self._reason_to_stop()
        if reason:
            self.status = OUT_OF_TIME if reason == "max_minutes" else INTERRUPTED
            self.control.should_training_stop = True
            self.control.should_save = True
            self.control.should_evaluate = reason == "max_minutes"
            return [], None
        passes = [self.prepare_pass(next(epoch_iterator)) for _ in range(num_batches)]
        self._pass = 0
        return passes, self._get_num_items_in_batch(passes, device)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        return self.accelerator.autocast()  # Accelerate puts it into a model's forward, but not into a sharded one's

    def seed_pass(self) -> int:
        """Seeds torch for the coming forward pass; its number within the step."""
        number, self._pass = self._pass, self._pass + 1
        parts = (self.args.seed, self.state.global_step, number, self.args.process_index)
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return number

    def _reason_to_stop(self) -> str | None:
        """The signal's name, "max_minutes", "stop_at_step", or None; the same answer on every process."""
        args, signal = self.args, self.stop_request.reason
        if 0 < getattr(args, "stop_at_step", 0) <= self.state.global_step:
            return "stop_at_step"
        limit = getattr(args, "max_minutes", 0)
        late = limit > 0 and self.seconds >= 60 * limit
        if self.accelerator.num_processes > 1:
            # Signals reach processes at different times. What they agreed on a step ago is already computed, so
            # reading it does not hold up the device.
            flags = torch.tensor([float(signal is not None), float(late)], device=self.accelerator.device)
            agreed, self._flags = self._flags, self.accelerator.reduce(flags, "sum")
            signalled, late = (False, False) if agreed is None else (value > 0 for value in agreed.tolist())
            signal = (signal or "a signal to another process") if signalled else None
        if signal:
            if self.is_world_process_zero():
                logger.info(
                    "step %d: %s; saving, then stopping. Go on with --resume_from_checkpoint latest",
                    self.state.global_step,
                    signal,
                )
            return signal
        return "max_minutes" if late else None

    def _check_agreement(self, step: int) -> None:
        steps = sorted(set(gather_object([step])))
        if len(steps) > 1:
            raise ConfigError(
                f"the processes start at different steps {steps}: output_dir {self.args.output_dir} must be one "
                "folder that all nodes see"
            )

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self.check_losses()
        if self.control.should_save:
            self.control.should_log = True  # what has been summed up would be lost with the process
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        return grad_norm  # Trainer's would go over all gradients for a number that only clipping needs

    def fail(self, what: str) -> NoReturn:
        """Ends the run. Raises NonFiniteLossError."""
        kept = self._last_checkpoint
        resume = (
            f"The last good checkpoint is {kept}; resume from it" if kept else "No checkpoint was written yet; start"
        )
        raise NonFiniteLossError(
            f"{what} (seen at step {self.state.global_step}). {resume} with a lower --learning_rate (now "
            f"{self.args.learning_rate:g}), or with --max_grad_norm 1.0"
        )

    # Optimizer and schedule

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        check_distribution(self.accelerator)
        if self.args.optim == MUON:
            refuse_muon_in_parts(self.accelerator)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices and kernels: norms and biases gain nothing from decay."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.optim == MUON:
            args = self.args
            self.optimizer = muon_with_adamw(
                model or self.model,
                args.learning_rate,
                args.weight_decay,
                args.muon_momentum,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None and self.args.lr_scheduler_type == ONE_CYCLE:
            rise = self.args.warmup_steps
            share = rise if rise < 1 else rise / num_training_steps
            self.lr_scheduler = OneCycle(optimizer or self.optimizer, num_training_steps, share)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # without Accelerate's wrapper

    # Checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint of weights that are known to be finite."""
        step, args = self.state.global_step, self.args
        final = Path(args.output_dir) / f"checkpoint-{step}"
        if not self.keep_checkpoints or step == 0 or self._last_checkpoint == final:
            return  # nothing to keep that is not there already
        if not all_finite(self.accelerator, self.model.parameters()):
            self.fail(f"a weight was not finite after step {step}")
        if self.is_deepspeed_enabled:
            super()._save_checkpoint(model, trial)
            return
        weights = self.accelerator.get_state_dict(self.model) if is_sharded(self.accelerator) else None
        moments = optimizer_tensors(self.model, self._bare_optimizer, keep=args.should_save)
        state = {
            "step": step,
            "optim": str(_plain(args.optim)),
            "scheduler": schedule_state(self.lr_scheduler),
            **self.run_state(),
        }
        if args.should_save:
            with new_checkpoint(args.output_dir, step, args.save_total_limit) as folder:
                self._save(str(folder), weights)
                save_file(moments, folder / OPTIMIZER_FILE)
                self.state.save_to_json(str(folder / "trainer_state.json"))
                write_json(folder / STATE_FILE, state)
            logger.info("step %d: saved %s", step, final)
        self.accelerator.wait_for_everyone()
        self._last_checkpoint = final
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes what `from_pretrained` reads; no pickle of the arguments beside it."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(folder, self.model, self.processing_class, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads the model of a checkpoint to the repository's root; Trainer would first write it, and a pickle, over
        what lies in output_dir."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._upload(checkpoint_folder, f"Training in progress, step {self.state.global_step}")

    def push_to_hub(self, commit_message: str | None = "End of training", **options: Any) -> str | None:
        """Uploads the finished model of output_dir and a draft of a card; `hf-wsl publish` writes a whole one.

        Returns:
            The address of the commit; None on other processes than the first.
        """
        if self.hub_model_id is None:
            self.init_hf_repo()
        if not self.is_world_process_zero():
            return None
        self.create_model_card(model_name=self.hub_model_id.rpartition("/")[2], **options)
        return self._upload(self.args.output_dir, commit_message)

    def _upload(self, folder: str, commit_message: str | None) -> str:
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        ignored = ["checkpoint-*", ".*", "runs/*", "*_state.json", OPTIMIZER_FILE, *self.not_uploaded]
        return (
            HfApi()
            .upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=commit_message,
                ignore_patterns=ignored,
                **options,
            )
            .commit_url
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Nothing: `train` has loaded the weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            state = read_state(Path(checkpoint))
            load_optimizer(Path(checkpoint), self.model, self._bare_optimizer)
            move_to_step(self.lr_scheduler, state["step"], state["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: every draw follows from the step."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: every draw follows from the step."""


class _Flow(TrainerCallback):
    """What happens around the steps. It comes before a user's callbacks, so that these see the epoch of the data."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        state.epoch = self.trainer.epoch_of(state.global_step)
        self.trainer._began = time.monotonic()
        self.trainer.begin(state.global_step)
        if state.global_step == 0 and not args.eval_on_start:
            self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        state.epoch = self.trainer.epoch_of(state.global_step)
        if state.global_step >= self.trainer.total_steps:
            control.should_log = control.should_evaluate = control.should_save = True


def _plain(value: Any) -> Any:
    """The text of one of transformers' enumerations."""
    return getattr(value, "value", value)
