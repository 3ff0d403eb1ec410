"""Trains the members of a stack at once and measures them at the epochs to keep."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from datasets_scripts.schema import SPLITS

from ..data.example_order import ExampleOrder
from .stack import Stack
from .zoo_config import ZooConfig
from .zoo_images import ZooImages


MOMENTUM, BETAS, EPSILON = 0.9, (0.9, 0.999), 1e-8  # torch's defaults
MEASURED_AT_ONCE = 100  # images; more would leave the CPU's cache


class StackedOptimizer:
    """torch's SGD with momentum, Adam and AdamW for M models at once, each with its own settings.

    Args:
        kind: "sgd", "adam" or "adamw", as torch defines them.
        parameters: `[M, P]`, updated in place.
        learning_rates, weight_decays: `[M, 1]`.
    """

    def __init__(self, kind: str, parameters: Tensor, learning_rates: Tensor, weight_decays: Tensor) -> None:
        self.kind, self.parameters = kind, parameters
        self.rates, self.decays = learning_rates, weight_decays
        self.first, self.second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step along the gradient `[M, P]`."""
        self.steps += 1
        if self.kind == "adamw":
            self.parameters.mul_(1 - self.rates * self.decays)
        else:
            gradient = gradient + self.decays * self.parameters
        if self.kind == "sgd":
            self.first.mul_(MOMENTUM).add_(gradient)
            self.parameters.sub_(self.rates * self.first)
            return
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrections = [1 - beta**self.steps for beta in BETAS]
        scale = self.second.sqrt().div_(corrections[1] ** 0.5).add_(EPSILON)
        self.parameters.sub_(self.rates / corrections[0] * self.first / scale)


@dataclass(frozen=True)
class Measured:
    """A stack after `epoch` epochs.

    Attributes:
        metrics: `train_accuracy`, `test_loss` (nats) ...: one number a member.
        diverged: member's index -> the epoch and step at which its loss or weights ceased to be finite.
    """

    epoch: int
    metrics: dict[str, list[float]]
    diverged: dict[int, str]


def train_stack(stack: Stack, images: ZooImages, config: ZooConfig) -> Iterator[Measured]:
    """Trains in place; yields at each epoch to keep, while the stack is in the state that was measured.

    Every member has its own learning rate, weight decay, dropout rate and order of images, which follow from its
    settings and seed. One that diverges is set to zero, so that nothing of it can reach the others, and stays there.
    A stack whose members have all diverged is yielded once more, without metrics unless it is an epoch to keep, and
    trained no further.
    """
    members = stack.members
    rates = torch.tensor([[member.learning_rate] for member in members])
    decays = torch.tensor([[member.weight_decay] for member in members])
    optimizer = StackedOptimizer(members[0].optimizer, stack.parameters, rates, decays)
    diverged: dict[int, str] = {}
    count, step = len(images.labels["train"]), 0
    orders = [ExampleOrder(count, config.batch_size, 1, 0, 1, member.seed) for member in members]
    seeds = [member.seed for member in members]
    if 0 in config.kept_epochs:
        yield Measured(0, _measure(stack, images, config), {})
    for epoch in range(1, max(config.kept_epochs, default=0) + 1):
        for indices in zip(*(order.batches(epoch) for order in orders), strict=True):
            batch, labels = images.batch([np.asarray(one) for one in indices], seeds, epoch, config.augment)
            losses = _losses(stack.logits(batch, step), labels).mean(1)
            (gradient,) = torch.autograd.grad(losses.sum(), stack.parameters)
            wrong = ~(losses.detach().isfinite() & gradient.isfinite().all(1))
            if wrong.any():
                _stop(stack, optimizer, wrong, gradient)
                for index in wrong.nonzero().flatten().tolist():
                    diverged.setdefault(
                        index, f"the loss or its gradient was not finite in epoch {epoch}, step {step}"
                    )
                if len(diverged) == len(members):
                    yield Measured(epoch, {}, dict(diverged))
                    return
            optimizer.step(gradient)
            step += 1
        if epoch in config.kept_epochs:
            metrics = _measure(stack, images, config)
            for index in range(len(members)):
                if not all(math.isfinite(values[index]) for values in metrics.values()):
                    diverged.setdefault(index, f"a measured loss was not finite after epoch {epoch}")
            yield Measured(epoch, metrics, dict(diverged))
            if len(diverged) == len(members):
                return


def _stop(stack: Stack, optimizer: StackedOptimizer, wrong: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        stack.parameters[wrong] = 0
    for tensor in (gradient, optimizer.rates, optimizer.first, optimizer.second):
        tensor[wrong] = 0


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies in nats, `[M, B]`, of logits `[M, B, classes]` and labels `[M, B]`."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


@torch.no_grad()
def _measure(stack: Stack, images: ZooImages, config: ZooConfig) -> dict[str, list[float]]:
    """Accuracy and mean loss of every member on the three splits, without dropout and augmentation."""
    metrics = {}
    for split in SPLITS:
        pixels, labels = images.evenly(split, config.max_measured if split == "train" else 0)
        right, loss = torch.zeros(2, len(stack.members), dtype=torch.float64)
        for some, true in zip(pixels.split(MEASURED_AT_ONCE), labels.split(MEASURED_AT_ONCE), strict=True):
            logits = stack.logits(some)
            right += (logits.argmax(2) == true).sum(1)
            loss += _losses(logits, true.expand(len(logits), -1)).double().sum(1)
        metrics[f"{split}_accuracy"] = (right / len(labels)).tolist()
        metrics[f"{split}_loss"] = (loss / len(labels)).tolist()
    return metrics
