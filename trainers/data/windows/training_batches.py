"""The training split as the trainer takes it: its size, a sample for PCA, and the batches from one step to another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .crops import TrainingOrder
from .dataset_source import SplitSize
from .window_data import WindowDataset, make_loader
from .window_files import WindowFiles
from .window_stream import Place, WindowStream
from .window_table import check_positions, every


logger = logging.getLogger(__name__)
Batches = Iterator[dict[str, torch.Tensor]]
_SAMPLED_SHARDS = 16  # half a gigabyte of row groups
_SAMPLED_WINDOWS = 16  # of each of them
# Fewer files than this for each process, and their row groups are dealt out instead: shares of an epoch then differ
# little, and a shuffled block holds windows of many models. To list the row groups, every file is opened once.
_FILES_PER_PROCESS = 4


@dataclass(frozen=True)
class BatchPlan:
    """How training windows become batches.

    Attributes:
        window_size: tokens of a crop.
        batch_size, accumulation: windows per forward pass, forward passes per step.
        rank, world_size: this process among all.
        seed: of order and crops.
        num_workers: threads that read for this process.
        buffer_size, crops_per_window, max_positions: of a stream, see `WindowStream`.
    """

    window_size: int
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    num_workers: int
    buffer_size: int = 1024
    crops_per_window: int = 1
    max_positions: Sequence[int] | None = None


class StoredBatches:
    """Training windows on the disk. Which crops a step holds depends on neither workers nor processes."""

    def __init__(self, windows: WindowDataset) -> None:
        self.windows = windows
        self.size = SplitSize(len(windows), int(windows.num_tokens.sum()))
        self.token_size = windows.token_size

    def __len__(self) -> int:
        return self.size.windows

    def check_positions(self, max_positions: Sequence[int]) -> None:
        """Raises DatasetError where learned position tables of these sizes are too small."""
        check_positions(self.windows.highest_positions(), max_positions, f"split '{self.windows.split}'")

    def sample(self, max_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Evenly spaced tokens, see `WindowDataset.sample`."""
        return self.windows.sample(max_tokens)

    def batches(self, plan: BatchPlan, first_step: int, last_step: int) -> Batches:
        """The batches of one process for these steps, the second excluded."""
        order = TrainingOrder(
            self.windows.num_tokens,
            plan.window_size,
            seed=plan.seed,
            batch_size=plan.batch_size,
            accumulation=plan.accumulation,
            rank=plan.rank,
            world_size=plan.world_size,
            first_step=first_step,
            last_step=last_step,
        )
        return iter(make_loader(self.windows, order, plan.num_workers))

    def state(self) -> list[int]:
        """Nothing: the step says where the order goes on."""
        return []

    def resume(self, states: list[list[int]]) -> None:
        """Nothing to take up."""


class StreamedBatches:
    """Training windows that are read as they are used.

    Args:
        rows: the training split.
        size: of that split.
    """

    def __init__(self, rows: WindowFiles, size: SplitSize) -> None:
        self.rows = rows
        self.size = size
        self.token_size = rows.token_size
        self._saved: list[list[int]] = []
        self._place = Place()

    def __len__(self) -> int:
        return self.size.windows

    def check_positions(self, max_positions: Sequence[int]) -> None:
        """Nothing yet: a stream looks at positions when it reads them."""

    def sample(self, max_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """About `max_tokens` tokens of the first windows of evenly spaced shards, as `WindowDataset.sample` gives."""
        shards = np.unique(np.linspace(0, self.rows.num_shards - 1, _SAMPLED_SHARDS).round().astype(int))
        for shard in shards:
            windows = self.rows.first_table(int(shard))
            if windows is not None:
                first = min(len(windows), _SAMPLED_WINDOWS)
                stride = max(1, -(-int(windows.num_tokens[:first].sum()) * len(shards) // max_tokens))
                yield from every(stride, map(windows.window, range(first)))

    def batches(self, plan: BatchPlan, first_step: int, last_step: int) -> Batches:
        """The batches of one process for these steps, the second excluded.

        Raises:
            DatasetError: fewer row groups than processes. While reading: a row that contradicts itself, a weight that
                is not finite, a position beyond `max_positions`, a source that stays out of reach.
        """
        self._place = self._beginning(plan.rank, plan.world_size)
        enough_files = self.rows.num_shards >= _FILES_PER_PROCESS * plan.world_size
        stream = WindowStream(
            self.rows if enough_files else self.rows.by_row_group(),
            window_size=plan.window_size,
            batch_size=plan.batch_size,
            seed=plan.seed,
            buffer_size=plan.buffer_size,
            crops_per_window=plan.crops_per_window,
            rank=plan.rank,
            world_size=plan.world_size,
            place=self._place,
            num_threads=plan.num_workers,
            max_positions=plan.max_positions,
        )
        return self._followed(iter(stream), (last_step - first_step) * plan.accumulation)

    def _followed(self, batches: Iterator[tuple[dict[str, torch.Tensor], Place]], count: int) -> Batches:
        """So many batches, noting the place that they end at."""
        for _ in range(count):
            batch, self._place = next(batches)
            yield batch

    def _beginning(self, rank: int, world_size: int) -> Place:
        if not self._saved:
            return Place()
        if len(self._saved) == world_size:
            return Place(*self._saved[rank])
        epoch = 1 + max(place[0] for place in self._saved)
        logger.warning(
            "the stream was read by %d processes and is by %d now: it goes on with epoch %d",
            len(self._saved),
            world_size,
            epoch,
        )
        return Place(epoch)

    def state(self) -> list[int]:
        """How far this process has come with the batches that were given out."""
        return list(self._place)

    def resume(self, states: list[list[int]]) -> None:
        """Goes on where every process stopped, by what `state` gave for each."""
        self._saved = states


TrainingBatches = StoredBatches | StreamedBatches
