"""Which tokens a step sees: every crop is a pure function of (seed, epoch, window).

Neither the number of workers and processes nor an interruption changes what a run sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio
_NEAREST = 0.381966  # epochs that follow each other are at least this share of the circle apart: 1 - 1 / golden ratio


class Crop(NamedTuple):
    """`length` consecutive tokens of row `window` from its token `start`."""

    window: int
    start: int
    length: int


class TrainingOrder(Sampler[list[Crop]]):
    """The batches of one process: an endless row of epochs, each a fresh permutation that visits every window once.

    A step's windows are consecutive in that row and the last step of the run may reach into one more epoch, so every
    batch is full. The split of a step into processes and accumulated batches does not change which windows it holds.

    Args:
        num_tokens: int64 `[windows]`.
        window_size: tokens of a crop (fewer where the window is shorter).
        batch_size, accumulation: windows per forward pass, forward passes per step.
        rank, world_size: this process among all.
        first_step, last_step: steps to yield, the second excluded.
    """

    def __init__(
        self,
        num_tokens: np.ndarray,
        window_size: int,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
        last_step: int,
    ) -> None:
        self.num_tokens = num_tokens
        self.window_size = window_size
        self.seed = seed
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.last_step = last_step
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Crop]]:
        for step in range(self.first_step, self.last_step):
            for micro in range(self.accumulation):
                first = step * self.windows_per_step + (micro * self.world_size + self.rank) * self.batch_size
                yield self.crops(first, self.batch_size)

    def crops(self, first: int, count: int) -> list[Crop]:
        """The crops at places `first` … `first + count` of the endless row of epochs."""
        crops: list[Crop] = []
        while len(crops) < count:
            epoch, at = divmod(first + len(crops), len(self.num_tokens))
            part = self._crops_of(epoch)[at : at + count - len(crops)]
            crops += map(Crop._make, part.tolist())
        return crops

    def _crops_of(self, epoch: int) -> np.ndarray:
        """All crops of an epoch in their order, int64 `[windows, 3]`: drawn at once, for one by one they take longer
        than they take to read.
        """
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=(self.seed, epoch)))
            order = generator.permutation(len(self.num_tokens))
            num_tokens = self.num_tokens[order]
            starts = crop_starts(self.seed, epoch, order, num_tokens, self.window_size)
            lengths = np.minimum(num_tokens, self.window_size)
            self._epoch = (epoch, np.stack([order, starts, lengths], axis=1))
        return self._epoch[1]


def crop_starts(seed: int, epoch: int, windows: np.ndarray, num_tokens: np.ndarray, window_size: int) -> np.ndarray:
    """Where the crops of windows begin in an epoch, int64; 0 where a window is not longer than the crop.

    Args:
        windows: numbers of the windows, `[n]`, not negative.
        num_tokens: tokens of each, int64 `[n]`.
        window_size: tokens of a crop.

    A place is drawn over the starts of all full crops *and* a margin of `window_size - 1` on both sides, then clipped:
    every token is seen in at least window_size / (num_tokens + window_size - 1) of the epochs. Drawing among the full
    crops only would show the first and last tokens (a model's stem and head) hundreds of times less often than the
    middle. From epoch to epoch the place moves by the golden ratio, which covers a window evenly. Below 1.6 crops a
    window has a smaller margin, so that no start holds more of the circle than that step passes over: the crops of
    epochs that follow each other always differ. The ends are then seen in 0.33 of the epochs or more.
    """
    starts = np.maximum(num_tokens - window_size + 1, 1)
    # The largest margin with (margin + 1) / (starts + 2 * margin), the share of the first start, below _NEAREST.
    largest = ((_NEAREST * starts - 1) / (1 - 2 * _NEAREST)).astype(np.int64)
    margin = np.minimum(window_size - 1, np.maximum(largest, 0))
    with np.errstate(over="ignore"):
        first = mix(mix(np.uint64(seed)) ^ windows.astype(np.uint64))
        place = first + np.uint64(epoch) * _GOLDEN
    drawn = _scaled(place, starts + 2 * margin) - margin
    drawn = np.clip(drawn, 0, starts - 1)
    alternating = (first % np.uint64(2)).astype(np.int64) + epoch  # no step of less than a half parts two starts
    return np.where(starts == 2, alternating % 2, drawn)


def _scaled(place: np.ndarray, size: np.ndarray) -> np.ndarray:
    """place * size // 2**64 as int64, for places in uint64 and sizes below 2**31; by halves: the product overflows."""
    size, half = size.astype(np.uint64), np.uint64(32)
    high, low = (place >> half) * size, (place & np.uint64(0xFFFFFFFF)) * size
    return ((high + (low >> half)) >> half).astype(np.int64)


def mix(value: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """splitmix64's finalizer: 64 well-mixed bits from each counter (uint64)."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def tiles(num_tokens: np.ndarray, window_size: int, max_windows: int = 0) -> list[Crop]:
    """Consecutive crops that cover each token of each window once; of `max_windows` evenly spaced windows if given."""
    rows = np.arange(len(num_tokens))
    if 0 < max_windows < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, max_windows).round().astype(np.int64)]
    return [
        Crop(int(row), start, min(window_size, int(num_tokens[row]) - start))
        for row in rows
        for start in range(0, int(num_tokens[row]), window_size)
    ]


def batches_of(crops: list[Crop], batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[Crop]]:
    """Splits crops over processes and batches, in order; the last batch is short."""
    mine = crops[rank::world_size]
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


def steps_for_epochs(num_windows: int, windows_per_step: int, epochs: float) -> int:
    """Steps that visit every window `epochs` times at least."""
    return max(1, math.ceil(num_windows * epochs / windows_per_step))
