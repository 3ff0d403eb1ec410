"""Ranking candidates on validation data (paper, appendix C.2: draw 50, keep 10). Never rank on a test split."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .batch_norm import model_inputs
from .ensemble import logits_of


Scorer = Callable[[nn.Module], float]


@torch.no_grad()
def accuracy(module: nn.Module, loader: Iterable[Any]) -> float:
    """The share of correctly classified examples.

    Args:
        module: a classifier in eval mode; returns logits `[N, classes]`, or an output with `logits`.
        loader: batches `(inputs, labels)`, or mappings with `labels`.

    Raises:
        ValueError: the loader yields nothing, or batches without labels, or the module is no classifier.
    """
    device = next(module.parameters()).device
    correct = total = 0
    for batch in loader:
        args, kwargs = model_inputs(batch, device)
        logits = logits_of(module(*args, **kwargs))  # [N, classes]
        labels = _labels(batch).to(device)  # [N]
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"rank: accuracy on a loader needs logits [N, classes] and labels [N], not {list(logits.shape)} and "
                f"{list(labels.shape)}. Pass a function module -> score, or a target with a classifier."
            )
        correct += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
    if total == 0:
        raise ValueError("rank: the validation loader yields no batch.")
    return correct / total


def scorer(rank: Scorer | Iterable[Any]) -> tuple[Scorer, str]:
    """(a function that scores a module, its name) of a callable, taken as it is, or of a validation loader."""
    if callable(rank):
        return rank, getattr(rank, "__qualname__", type(rank).__qualname__)
    return lambda module: accuracy(module, rank), "validation accuracy"


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]
    if not isinstance(batch, Tensor | tuple | list) and "labels" in batch:
        return batch["labels"]
    raise ValueError("rank: a validation batch has no labels; give (inputs, labels) or a mapping with 'labels'.")
