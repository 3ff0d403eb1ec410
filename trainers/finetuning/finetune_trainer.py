"""`FinetuneTrainer`: `transformers.Trainer` for the models of the zoo, of the command and of each arm of a comparison.

Two runs with the same seed see the same examples in the same order, augmented in the same way, whatever model they
train and however many processes load the examples.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object, send_to_device
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_wsl.errors import RunError
from modeling_wsl.files import sha256

from ..checkpointing import CheckpointStateError, last_checkpoint
from ..data.example_order import EpochDataset, ExampleOrder
from ..distribution import is_sharded
from ..run_trainer import COMPLETED, INTERRUPTED, NonFiniteLossError, RunTrainer
from .finetune_config import FinetuneConfig
from .finetune_options import FinetuneOptions
from .measure import (
    check_classes,
    count_examples,
    evaluation_loader,
    first_batch,
    make_loader,
    measure,
    predict_and_score,
)
from .tasks import IMAGE_CLASSIFICATION, Task


__all__ = ["DivergedError", "FinetuneTrainer", "Measurement", "finetune", "measure"]
logger = logging.getLogger(__name__)
# Options that decide what a run computes; with another value it is another run.
_RUN = tuple(FinetuneOptions().to_dict().keys() - {"dataloader_num_workers", "use_cpu", "logging_steps"})


class DivergedError(NonFiniteLossError):
    """The training loss became NaN or infinite."""


@dataclass(frozen=True)
class Measurement:
    """The model after `step` optimizer steps; step 0 is the model as it was given.

    Attributes:
        epoch: passes over the training examples so far.
        examples: training examples seen so far, over all processes.
        train_loss: mean over the examples since the last measurement, as they were trained on.
        metrics: of the validation examples, by name (see the task).
    """

    step: int
    epoch: float
    examples: int
    train_loss: float | None
    metrics: dict[str, float]


class FinetuneTrainer(RunTrainer):
    """Trains a model of any library in place; measures it before, after every epoch (or `eval_steps`) and at the end.

    A step on two processes, or on accumulated passes, is that of one with as many examples.

    Args:
        model: see `task`.
        args: the run's options.
        train_dataset: map-style dataset of examples as the task takes them. An `EpochDataset` is told every epoch.
        eval_dataset: map-style dataset.
        processing_class: a tokenizer, saved beside the model.
        task: see `tasks`.
        keep_checkpoints: false writes none, and leaves signals as they are.
        callbacks: of transformers.

    Attributes:
        history: a `Measurement` each time, the first one before training.

    Raises:
        ValueError: fewer examples than parts of a step, a model or data that do not fit the task.
    """

    def __init__(
        self,
        model: nn.Module,
        args: FinetuneConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        task: Task = IMAGE_CLASSIFICATION,
        keep_checkpoints: bool = True,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.task, self.history, self.keep_checkpoints = task, [], keep_checkpoints
        self.order = ExampleOrder(
            len(train_dataset),
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
            args.seed,
        )
        self.total_steps = args.max_steps or math.ceil(args.num_train_epochs * self.order.steps_per_epoch)
        model.to(memory_format=task.memory_format)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        if is_sharded(self.accelerator):
            raise ValueError(
                "Accelerate is set to FSDP; fine-tuning keeps the whole model on every process. Leave it out."
            )
        self.validation = evaluation_loader(
            self.accelerator, eval_dataset, args.per_device_eval_batch_size, args.eval_batches
        )
        self.classes = task.num_classes(model, first_batch(eval_dataset))
        self.sums = torch.zeros(2, device=self.accelerator.device)  # loss x examples, examples; since a measurement
        self.about = {
            "config": {name: value for name, value in args.to_dict().items() if name in _RUN},
            "task": task.name,
            "examples": [len(train_dataset), len(eval_dataset)],
            "processes": args.world_size,
        }
        if keep_checkpoints:
            self.about["initial_weights"] = _weights_digest(model)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> TrainOutput | None:
        """`RunTrainer.train`; no epochs measure the model and change nothing."""
        if self.total_steps == 0:
            self.evaluate()
            self.status = COMPLETED
            return None
        try:
            return super().train(resume_from_checkpoint, **options)
        finally:
            self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)  # takes autocast off `forward`
            self.model.to(memory_format=torch.contiguous_format)

    # Data and loss

    def batches_from(self, step: int) -> Iterator[Any]:
        while True:
            epoch, first = divmod(step, self.order.steps_per_epoch)
            if isinstance(self.train_dataset, EpochDataset):
                self.train_dataset.begin_epoch(self.args.seed, epoch)
            yield from make_loader(
                self.train_dataset, self.order.batches(epoch, first), self.args.dataloader_num_workers
            )
            step = (epoch + 1) * self.order.steps_per_epoch

    def prepare_pass(self, batch: Any) -> Any:
        check_classes(self.task, batch, self.classes)
        return send_to_device(batch, self.accelerator.device)

    def epoch_of(self, step: int) -> float:
        epochs, rest = divmod(step, self.order.steps_per_epoch)
        return epochs + rest * self.order.step_size / self.order.examples_per_epoch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """The examples of the step, over all processes."""
        return self.order.examples_of(self.state.global_step % self.order.steps_per_epoch)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        self.seed_pass()
        logits, labels = self.task.forward(model, inputs)
        loss, here = cross_entropy(logits.float(), labels), count_examples(inputs)
        self.sums += torch.stack([loss.detach() * here, torch.full_like(loss, here)])
        # Gradients become their mean over processes; shares add up to one over all.
        loss = loss * (here * self.accelerator.num_processes / (num_items_in_batch or here))
        return (loss, logits) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # Measurements and checkpoints

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        step, args = self.state.global_step, self.args
        due = step % (args.eval_steps or self.order.steps_per_epoch) == 0
        self.control.should_evaluate |= due
        self.control.should_save |= due and not args.save_steps
        self.control.should_save &= self.keep_checkpoints
        super()._maybe_log_save_evaluate(*arguments, **options)

    def check_losses(self) -> None:
        """Raises DivergedError where the mean loss since the last measurement is not finite."""
        self._train_loss()

    def _train_loss(self) -> float | None:
        totals = self.accelerator.reduce(self.sums.clone())
        loss = (totals[0] / totals[1]).item() if totals[1] else None
        if loss is not None and not math.isfinite(loss):
            raise DivergedError(
                f"The training loss is {loss} at step {self.state.global_step} (epoch "
                f"{self.epoch_of(self.state.global_step):.4g}): the run has diverged. Lower the learning rate (now "
                f"{self.args.learning_rate}) or train in float32."
            )
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures the model on the validation examples, once a step; see `Measurement`."""
        step = self.state.global_step
        if not self.history or self.history[-1].step != step:
            train_loss = self._train_loss()
            for buffer in self.model.buffers():  # batch norms saw other images on every process; keep the first's
                broadcast(buffer)
            with self.accelerator.autocast():
                metrics = predict_and_score(self.accelerator, self.model, self.validation, self.task, self.classes)
            epochs, rest = divmod(step, self.order.steps_per_epoch)
            examples = epochs * self.order.examples_per_epoch + rest * self.order.step_size
            self.history.append(Measurement(step, self.epoch_of(step), examples, train_loss, metrics))
            self.sums.zero_()
            self.log({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            logger.debug("%s", self.history[-1])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.history[-1].metrics.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def run_state(self) -> dict[str, Any]:
        history = [asdict(line) for line in self.history]
        return {"run": self.about, "sums": gather_object([self.sums.tolist()]), "history": history}

    def load_run_state(self, state: dict[str, Any]) -> None:
        before = state.get("run", {})
        changed = [
            f"{key} was {before.get(key)}, now {value}"
            for key, value in self.about.items()
            if before.get(key) != value
        ]
        if changed:
            raise CheckpointStateError(
                f"{self._last_checkpoint} is of another run ({'; '.join(changed)}). Choose another output_dir, or "
                "delete this one"
            )
        self.history = [Measurement(**line) for line in state["history"]]
        self.sums.copy_(torch.tensor(state["sums"][self.accelerator.process_index]))
        logger.info("going on from %s", self._last_checkpoint)


def finetune(
    model: nn.Module,
    train: Dataset,
    validation: Dataset,
    config: FinetuneOptions | None = None,
    progress: bool = True,
    *,
    task: Task = IMAGE_CLASSIFICATION,
    output_dir: str | Path | None = None,
    save_steps: int | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> list[Measurement]:
    """Trains a model in place with a `FinetuneTrainer`.

    Args:
        model: see `task`; moved to Accelerate's device.
        train: map-style dataset of examples as the task takes them. An `EpochDataset` is told every epoch.
        validation: map-style dataset.
        config: see `FinetuneOptions`.
        progress: show a bar over the steps.
        task: see `tasks`.
        output_dir: keeps a checkpoint here, and goes on from one that is there: a run that was killed and started
            again ends with the same bytes as one that was not. None: no checkpoints.
        save_steps: steps between checkpoints; None: at every measurement.
        callbacks: of transformers.

    Returns:
        The measurements, the first one before training.

    Raises:
        ValueError: an empty dataset, a label that the model has no logit for, images that it cannot take.
        CheckpointStateError: `output_dir` holds a checkpoint of another run.
        DivergedError: the training loss is not finite.
        RunError: a signal stopped a run with an `output_dir`; it goes on when it is started again.
    """
    for name, dataset in (("training", train), ("validation", validation)):
        if len(dataset) == 0:
            raise ValueError(f"The {name} dataset is empty; it must hold at least one {task.unit}.")
    with contextlib.ExitStack() as stack:
        folder = output_dir or stack.enter_context(tempfile.TemporaryDirectory())
        args = FinetuneConfig.of(
            config or FinetuneOptions(),
            model,
            output_dir=str(folder),
            save_steps=save_steps or 0,
            disable_tqdm=True if not progress else None,
        )
        trainer = FinetuneTrainer(
            model, args, train, validation, task=task, keep_checkpoints=output_dir is not None, callbacks=callbacks
        )
        trainer.train(last_checkpoint(output_dir) if output_dir else None)
    if trainer.status == INTERRUPTED and output_dir is not None:
        raise RunError(
            f"stopped by a signal at step {trainer.state.global_step} of {trainer.total_steps}; a checkpoint is in "
            f"{output_dir}. Run the same command again to go on"
        )
    return trainer.history


def _weights_digest(model: nn.Module) -> str:
    """SHA-256 of a state dict's names and values."""
    parts: list[Any] = []
    for name, tensor in model.state_dict().items():
        parts += [name, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()]
    return sha256(parts)
