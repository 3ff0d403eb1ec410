"""Logits of a generated classifier and of an ensemble, and the ranking of candidates by them.

Candidates are ranked on validation data (paper, appendix C.2: draw 50, keep 10), never on a test split.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .batch_norm import model_inputs


Scorer = Callable[[nn.Module], float]


def logits_of(output: Tensor | ModelOutput) -> Tensor:
    """The logits of what a model of timm, torch or transformers returns."""
    return output.logits if isinstance(output, ModelOutput) else output


class Ensemble(nn.Module):
    """Several models as one: its logits are the mean of theirs.

    Args:
        members: modules that take the same input and return logits of one shape, or an output with `logits`, such as
            `GeneratedModel.instantiate` gives.

    Raises:
        ValueError: no member.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise ValueError("members is empty: an ensemble needs one model, or more.")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Mean logits, of the members' shape, for a member's arguments.

        Raises:
            ValueError: the members' logits differ in shape.
        """
        logits = [logits_of(member(*args, **kwargs)) for member in self.members]
        if len(shapes := {tuple(part.shape) for part in logits}) > 1:
            raise ValueError(
                f"The members' logits differ in shape ({', '.join(map(str, sorted(shapes)))}): an ensemble is made "
                "of models for the same classes."
            )
        return torch.stack(logits).mean(0)


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
