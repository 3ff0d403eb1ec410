"""Which training examples a step sees: a function of (seed, epoch, step) alone, however a step is split."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset


class EpochDataset(Dataset):
    """A dataset whose examples differ from epoch to epoch: augmented images."""

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """From now on example i is the one that follows from (seed, epoch, i)."""
        self.seed, self.epoch = seed, epoch


class ExampleOrder:
    """Every epoch is a permutation of all examples, cut into steps, each split over processes and forward passes.

    The last step of an epoch is smaller, its parts of equal size or one apart. It is left out where a part would hold
    less than two examples: batch norm cannot be trained on one.

    Args:
        num_examples: of the training set.
        batch_size, accumulation: examples a forward pass, forward passes a step.
        rank, world_size: this process among all.
        seed: of the permutations.

    Raises:
        ValueError: fewer examples than parts of a step.
    """

    def __init__(
        self, num_examples: int, batch_size: int, accumulation: int, rank: int, world_size: int, seed: int
    ) -> None:
        self.num_examples, self.seed = num_examples, seed
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.parts = accumulation * world_size
        self.step_size = batch_size * self.parts
        if num_examples < self.parts:
            raise ValueError(
                f"A step is split into {self.parts} parts (forward passes x processes), and there are {num_examples} "
                "training examples. Lower gradient_accumulation_steps, or use fewer processes."
            )
        full, rest = divmod(num_examples, self.step_size)
        self.steps_per_epoch = full + (rest > 0 and (rest // self.parts >= 2 or full == 0))
        self.examples_per_epoch = min(self.steps_per_epoch * self.step_size, num_examples)

    def examples_of(self, step: int) -> int:
        """How many examples a step (of an epoch) holds, over all processes."""
        return min(self.step_size, self.num_examples - step * self.step_size)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[list[int]]:
        """This process's batches of an epoch from a step on, `accumulation` of them a step."""
        order = np.random.Generator(np.random.Philox(key=(self.seed, epoch))).permutation(self.num_examples)
        for step in range(first_step, self.steps_per_epoch):
            parts = np.array_split(order[step * self.step_size : (step + 1) * self.step_size], self.parts)
            yield from (parts[micro * self.world_size + self.rank].tolist() for micro in range(self.accumulation))
