"""How good a model is on a dataset, and what fine-tuning shares with that: loaders, and labels that have a logit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from .tasks import IMAGE_CLASSIFICATION, Task, scores


def measure(
    model: nn.Module,
    dataset: Dataset,
    task: Task = IMAGE_CLASSIFICATION,
    batch_size: int = 256,
    use_cpu: bool = False,
    max_batches: int | None = None,
) -> dict[str, float]:
    """The task's metrics of a model in eval mode and in its own dtype, on Accelerate's device.

    Args:
        model: see `task`.
        dataset: map-style dataset of examples as the task takes them.
        batch_size: examples at a time; does not change the result beyond rounding.
        use_cpu: stay on the CPU where a GPU is present.
        max_batches: measure on so many evenly spaced batches' worth of examples; None: on all.

    Raises:
        ValueError: an empty dataset, a label that the model has no logit for, images that it cannot take.
    """
    if len(dataset) == 0:
        raise ValueError(f"The dataset to measure on is empty; it must hold at least one {task.unit}.")
    processes = PartialState(cpu=use_cpu)
    model.to(processes.device, memory_format=task.memory_format)
    loader = evaluation_loader(processes, dataset, batch_size, max_batches)
    classes = task.num_classes(model, first_batch(dataset))
    metrics = predict_and_score(processes, model, loader, task, classes)
    model.to(memory_format=torch.contiguous_format)
    return metrics


@torch.no_grad()
def predict_and_score(
    processes: Accelerator | PartialState, model: nn.Module, loader: DataLoader, task: Task, classes: int
) -> dict[str, float]:
    """The task's metrics of a loader's batches, and of those of the other processes; the same on all of them."""
    was_training = model.training
    model.eval()
    losses, predictions, labels = [], [], []
    for batch in loader:
        check_classes(task, batch, classes)
        logits, true = task.forward(model, send_to_device(batch, processes.device))
        losses.append(cross_entropy(logits.float(), true, reduction="none"))
        predictions.append(logits.argmax(-1))
        labels.append(true)
    model.train(was_training)
    gathered = [torch.cat(parts).cpu().numpy() for parts in (losses, predictions, labels) if parts]
    everywhere = gather_object([gathered]) if processes.num_processes > 1 else [gathered]
    shares = [share for share in everywhere if share]  # a process may have had no batch
    return scores(task, *(np.concatenate(parts) for parts in zip(*shares, strict=True)))


def make_loader(dataset: Dataset, batches: Iterable[list[int]], num_workers: int = 0) -> DataLoader:
    # A generator of its own: else making an iterator would draw from the global one.
    own = torch.Generator().manual_seed(0)
    pinned = torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=list(batches), num_workers=num_workers, generator=own, pin_memory=pinned)


def evaluation_loader(
    processes: Accelerator | PartialState, dataset: Dataset, batch_size: int, max_batches: int | None = None
) -> DataLoader:
    """This process's share of the batches; of `max_batches` of evenly spaced examples where there are more."""
    count = len(dataset) if max_batches is None else min(len(dataset), max_batches * batch_size)
    chosen = [index * len(dataset) // count for index in range(count)]
    batches = [chosen[start : start + batch_size] for start in range(0, count, batch_size)]
    return make_loader(dataset, batches[processes.process_index :: processes.num_processes])


def first_batch(dataset: Dataset) -> Any:
    return next(iter(make_loader(dataset, [[0]])))


def check_classes(task: Task, batch: Any, classes: int) -> None:
    """Raises ValueError where a label of a batch has no logit."""
    highest = task.highest_class(batch)
    if highest >= classes:
        raise ValueError(
            f"Label {highest} has no logit: the model gives {classes}. Build it with {highest + 1} classes or more "
            "(num_classes; of a language model, vocab_size)."
        )


def count_examples(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])
