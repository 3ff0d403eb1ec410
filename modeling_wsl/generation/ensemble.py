"""Logits of a model, and their mean over the models of an ensemble."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


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
