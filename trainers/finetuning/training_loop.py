"""Fine-tuning on Accelerate: the one training loop of the zoo, the command and every arm that is compared."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, send_to_device
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hf_wsl.errors import RunError
from hf_wsl.files import remove_leftovers

from ..checkpointing import last_checkpoint
from ..data.example_order import EpochDataset, ExampleOrder
from ..optimization import SCHEDULES, parameter_groups, set_step
from .finetune_checkpoints import load_finetuning, restore, save_finetuning, weights_digest
from .finetune_config import FinetuneConfig
from .measure import (
    check_classes,
    count_examples,
    evaluation_loader,
    first_batch,
    make_accelerator,
    make_loader,
    measure,
    predict_and_score,
)
from .tasks import IMAGE_CLASSIFICATION, Task


__all__ = ["DivergedError", "FinetuneConfig", "Measurement", "finetune", "measure"]
logger = logging.getLogger(__name__)
# Options that change how a run is carried out, and not what comes out of it.
_WITHOUT_EFFECT = ("num_workers", "use_cpu")


class DivergedError(RunError, FloatingPointError):
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


def finetune(
    model: nn.Module,
    train: Dataset,
    validation: Dataset,
    config: FinetuneConfig | None = None,
    progress: bool = True,
    *,
    task: Task = IMAGE_CLASSIFICATION,
    output_dir: str | Path | None = None,
    save_steps: int | None = None,
) -> list[Measurement]:
    """Trains a model in place, and measures it before, after every epoch (or `eval_steps`) and at the end.

    Two runs with the same seed see the same examples in the same order, augmented in the same way, whatever model they
    train and however many processes load the examples: the arms of a comparison differ in their initial weights and
    in nothing else. Dropout is seeded by the step. A step on two processes is that of one with twice the batch.

    Args:
        model: see `task`; moved to Accelerate's device.
        train: map-style dataset of examples as the task takes them. An `EpochDataset` is told every epoch.
        validation: map-style dataset.
        config: see `FinetuneConfig`.
        progress: show a bar over the steps.
        task: see `tasks`.
        output_dir: keeps a checkpoint here, and goes on from one that is there: a run that was killed and started
            again ends with the same bytes as one that was not. None: no checkpoints.
        save_steps: steps between checkpoints; None: at every measurement.

    Returns:
        The measurements, the first one before training.

    Raises:
        ValueError: an empty dataset, a label that the model has no logit for, images that it cannot take.
        CheckpointStateError: `output_dir` holds a checkpoint of another run.
        DivergedError: the training loss is not finite.
    """
    config = config or FinetuneConfig()
    for name, dataset in (("training", train), ("validation", validation)):
        if len(dataset) == 0:
            raise ValueError(f"The {name} dataset is empty; it must hold at least one {task.unit}.")
    accelerator = make_accelerator(config.mixed_precision, config.use_cpu)
    run = _Run(accelerator, model, train, validation, config, task, output_dir and Path(output_dir), save_steps)
    try:
        with tqdm(
            total=run.total_steps,
            initial=run.step,
            desc="fine-tune",
            unit="step",
            disable=not (progress and accelerator.is_local_main_process),
        ) as bar:
            run.train(bar)
    finally:
        accelerator.unwrap_model(run.prepared, keep_fp32_wrapper=False)  # takes the autocast off `model.forward`
        model.to(memory_format=torch.contiguous_format)
    return run.history


class _Run:
    """State of a run between its steps."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        train: Dataset,
        validation: Dataset,
        config: FinetuneConfig,
        task: Task,
        output_dir: Path | None,
        save_steps: int | None,
    ) -> None:
        self.accelerator, self.config, self.task = accelerator, config, task
        self.dataset, self.output_dir, self.save_steps = train, output_dir, save_steps
        world = accelerator.num_processes
        self.order = ExampleOrder(
            len(train), config.batch_size, config.gradient_accumulation, accelerator.process_index, world, config.seed
        )
        self.total_steps = config.max_steps or config.epochs * self.order.steps_per_epoch
        self.validation = evaluation_loader(accelerator, validation, config.eval_batch_size, config.eval_batches)
        self.model = model.to(accelerator.device, memory_format=task.memory_format)
        self.classes = task.num_classes(model, first_batch(validation))
        self.about = {
            "config": {name: value for name, value in asdict(config).items() if name not in _WITHOUT_EFFECT},
            "task": task.name,
            "examples": [len(train), len(validation)],
            "processes": world,
        }
        if output_dir is not None:
            self.about["initial_weights"] = weights_digest(model)
        self.step, self.history = 0, []
        self.sums = torch.zeros(2, device=accelerator.device)  # loss x examples, examples; since the last measurement
        checkpoint = last_checkpoint(output_dir) if output_dir else None
        state = load_finetuning(checkpoint, self.about) if checkpoint else None
        self.prepared = accelerator.prepare_model(model)
        self.optimizer = _adamw(model, config)
        if state is not None:
            restore(checkpoint, model, self.optimizer)
            self.step, self.history = state["step"], [Measurement(**line) for line in state["history"]]
            self.sums.copy_(torch.tensor(state["sums"][accelerator.process_index]))
            logger.info("going on from %s", checkpoint)
        elif output_dir is not None and accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
        if output_dir is not None and accelerator.is_main_process:
            remove_leftovers(output_dir)
        self.saved_step = self.step

    def train(self, bar: tqdm) -> None:
        if not self.history:
            self._measure(bar)
        while self.step < self.total_steps:
            self._train_epoch(bar)
        self._save()

    def _train_epoch(self, bar: tqdm) -> None:
        """From the current step to the end of its epoch, or of the run."""
        config, order = self.config, self.order
        epoch, first = divmod(self.step, order.steps_per_epoch)
        if isinstance(self.dataset, EpochDataset):
            self.dataset.begin_epoch(config.seed, epoch)
        batches = iter(make_loader(self.dataset, order.batches(epoch, first), config.num_workers))
        self.model.train()
        for step in range(first, order.steps_per_epoch):
            self._step(batches, order.examples_of(step))
            bar.update()
            ends_epoch = step + 1 == order.steps_per_epoch
            due = ends_epoch if config.eval_steps is None else self.step % config.eval_steps == 0
            ends = self.step == self.total_steps
            if due or ends:
                self._measure(bar)
            if self.step % self.save_steps == 0 if self.save_steps else due:
                self._save()
            if ends:
                return

    def _step(self, batches: Iterator[Any], examples: int) -> None:
        """One optimizer step on the mean loss of its examples, those of the other processes included."""
        config, accelerator = self.config, self.accelerator
        rate = SCHEDULES[config.schedule](
            self.step,
            self.total_steps,
            learning_rate=config.learning_rate,
            beta1=0.95 if config.schedule == "onecycle" else 0.9,  # of torch's OneCycleLR, and of Adam
            warmup_fraction=config.warmup_fraction if config.schedule == "onecycle" else 0.0,
        )
        set_step(self.optimizer, *rate)
        for micro in range(config.gradient_accumulation):
            batch = next(batches)
            check_classes(self.task, batch, self.classes)
            torch.manual_seed(_dropout_seed(config.seed, self.step, micro, accelerator.process_index))
            last = micro == config.gradient_accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.prepared):
                logits, labels = self.task.forward(self.prepared, send_to_device(batch, accelerator.device))
                loss = cross_entropy(logits.float(), labels)
                here = count_examples(batch)
                # Gradients become their mean over processes; shares add up to one over all.
                accelerator.backward(loss * (here * accelerator.num_processes / examples))
            self.sums += torch.stack([loss.detach() * here, torch.full_like(loss, here)])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _measure(self, bar: tqdm) -> None:
        totals = self.accelerator.reduce(self.sums.clone())
        train_loss = (totals[0] / totals[1]).item() if self.step else None
        epochs, rest = divmod(self.step, self.order.steps_per_epoch)
        epoch = epochs + rest * self.order.step_size / self.order.examples_per_epoch
        if train_loss is not None and not math.isfinite(train_loss):
            raise DivergedError(
                f"The training loss is {train_loss} at step {self.step} (epoch {epoch:.4g}): the run has diverged. "
                f"Lower the learning rate (now {self.config.learning_rate}) or train in float32."
            )
        for buffer in self.model.buffers():  # batch norms have seen other images on every process; keep the first's
            broadcast(buffer)
        metrics = predict_and_score(self.accelerator, self.model, self.validation, self.task, self.classes)
        examples = epochs * self.order.examples_per_epoch + rest * self.order.step_size
        self.history.append(Measurement(self.step, epoch, examples, train_loss, metrics))
        self.sums.zero_()
        bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()}, refresh=False)
        logger.debug("%s", self.history[-1])

    def _save(self) -> None:
        if self.output_dir is None or self.saved_step == self.step:
            return
        sums = gather_object([self.sums.tolist()])
        if self.accelerator.is_main_process:
            history = [asdict(line) for line in self.history]
            state = {"step": self.step, "run": self.about, "sums": sums, "history": history}
            save_finetuning(self.output_dir, self.step, self.model, self.optimizer, state)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.step


def _dropout_seed(seed: int, step: int, micro: int, process: int) -> int:
    return int(np.random.SeedSequence((seed, step, micro, process)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _adamw(model: nn.Module, config: FinetuneConfig) -> torch.optim.AdamW:
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "xpu")
    return torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate, fused=fused)
