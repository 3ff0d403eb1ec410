"""Training windows as a stream, for datasets that do not fit on the disk: what a process reads, in which order.

The order is a pure function of the seed and of a place, so a run that was interrupted goes on where it stopped:

* Every epoch the shards (Parquet files, or row groups) come in a new order and are dealt out like cards to the
  processes. A process that is done with its share of an epoch goes on with its share of the next one.
* A process shuffles by blocks: the crops of so many consecutive windows of its share come in random order, while the
  next block is read, one window for each that is given out. Two blocks are in memory.
* Where a crop lies depends on the seed, the window and the visit alone, as with windows on the disk.

Threads read and decode row groups ahead; how many there are changes nothing. The shuffle buffer of `datasets` mixes a
little further than two blocks, but what it holds depends on all that was read before, so a run that resumes could not
refill it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from .crops import Crop, crop_starts
from .reading import AHEAD, BatchMemory
from .window_files import WindowFiles
from .window_table import CroppedTokens, DatasetError, WindowTable, check_positions, collate


class Place(NamedTuple):
    """How far a process has come: `taken` crops of the block that begins at row `row` of its share's shard `shard`."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0


class WindowStream:
    """Endless batches of crops for one process.

    Args:
        rows: the training split.
        window_size: tokens of a crop (fewer where the window is shorter); batches are padded to it.
        batch_size: crops of a batch.
        seed: of the order and of the crops.
        buffer_size: crops of a block.
        crops_per_window: crops that are taken from a window whenever it is read; so many visits are one epoch here.
        rank, world_size: this process among all.
        place: where it begins.
        num_threads: that read ahead.
        max_positions: sizes of the learned position tables, if there are any.

    Raises:
        DatasetError: fewer shards than processes.
    """

    def __init__(
        self,
        rows: WindowFiles,
        *,
        window_size: int,
        batch_size: int,
        seed: int,
        buffer_size: int,
        crops_per_window: int = 1,
        rank: int = 0,
        world_size: int = 1,
        place: Place | None = None,
        num_threads: int = 0,
        max_positions: tuple[int, ...] | list[int] | None = None,
    ) -> None:
        self.rows = rows
        self.window_size = window_size
        self.batch_size = batch_size
        self.seed = seed
        self.crops_per_window = crops_per_window
        self.windows_per_block = max(1, buffer_size // crops_per_window)
        self.rank, self.world_size = rank, world_size
        self.place = place or Place()
        self.num_threads = num_threads
        self.max_positions = max_positions
        if rows.num_shards < world_size:
            raise DatasetError(
                f"the training split has {rows.num_shards} row groups, too few for {world_size} processes. Use fewer, "
                "or read so small a dataset without --streaming"
            )

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], Place]]:
        """Yields batches (see `collate`), each with the place after it."""
        batch: list[CroppedTokens] = []
        memory = BatchMemory()
        for crop, place in self._crops(self.place):
            batch.append(crop)
            if len(batch) == self.batch_size:
                yield collate(batch, memory, self.window_size), place
                batch = []

    def _crops(self, start: Place) -> Iterator[tuple[CroppedTokens, Place]]:
        """The crops in the order in which they are given out, each with the place after it."""
        blocks = groupby(self._windows(start), key=itemgetter(0))  # lazy: a block is read as it is asked for
        beginning, windows = next(blocks)
        block = [crop for _, crops in windows for crop in crops]
        taken = start.taken
        while True:
            next_beginning, windows = next(blocks)
            next_block: list[CroppedTokens] = []
            seeds = np.random.SeedSequence((self.seed, self.rank, *beginning))
            order = np.random.Generator(np.random.Philox(seeds)).permutation(len(block))
            for at, index in enumerate(order):
                if at % self.crops_per_window == 0:
                    next_block += [crop for _, crops in islice(windows, 1) for crop in crops]
                if at >= taken:
                    yield block[index], beginning._replace(taken=at + 1)
            next_block += [crop for _, crops in windows for crop in crops]
            beginning, block, taken = next_beginning, next_block, 0

    def _windows(self, start: Place) -> Iterator[tuple[Place, list[CroppedTokens]]]:
        """The windows of the process as they are read: the beginning of the block of each, and its crops."""
        asked: deque[tuple[int, int, int, int]] = deque()  # epoch, place in the share, shard, first row
        count, epoch, taken = 0, start.epoch, -1
        for at, first, table in self.rows.tables(self._shards(start, asked), self.num_threads):
            for _ in range(at - taken):
                now, place, shard, first_row = asked.popleft()
            taken = at
            if now != epoch:
                count, epoch = 0, now  # blocks do not reach from one epoch into the next
            crops = self._crops_of(table, epoch)
            for row in range(max(0, first_row - first), len(table)):
                if count % self.windows_per_block == 0:
                    beginning = Place(epoch, place, first + row)
                count += 1
                yield beginning, [self._cut(table, crop, key, shard) for crop, key in crops[row]]

    def _shards(self, start: Place, asked: deque[tuple[int, int, int, int]]) -> Iterator[tuple[int, int]]:
        """The shards of this process, epoch after epoch, each with the row to begin at; noted in `asked`."""
        epoch, first_shard, first_row, _ = start
        while True:
            share = self._order(epoch)[self.rank :: self.world_size].tolist()
            for place in range(first_shard, len(share)):
                asked.append((epoch, place, share[place], first_row))
                yield share[place], first_row
                first_row = 0
            if len(asked) > 2 * (len(share) + AHEAD * self.num_threads + 1):  # and no table came of them
                raise DatasetError("split 'train' has files without windows. Write the dataset with `hf-wsl tokenize`")
            epoch, first_shard, first_row = epoch + 1, 0, 0

    def _order(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=(self.seed, epoch)))
        return generator.permutation(self.rows.num_shards)

    def _crops_of(self, table: WindowTable, epoch: int) -> list[list[tuple[Crop, int]]]:
        """The crops of every window of a table in an epoch, each with the window's key."""
        keys = [_window_key(table.model_id(row), table.token_start(row)) for row in range(len(table))]
        lengths = np.minimum(table.num_tokens, self.window_size).tolist()
        crops: list[list[tuple[Crop, int]]] = [[] for _ in keys]
        for visit in range(epoch * self.crops_per_window, (epoch + 1) * self.crops_per_window):
            starts = crop_starts(self.seed, visit, np.array(keys), table.num_tokens, self.window_size)
            for row, start in enumerate(starts.tolist()):
                crops[row].append((Crop(row, start, lengths[row]), keys[row]))
        return crops

    def _cut(self, table: WindowTable, crop: Crop, key: int, shard: int) -> CroppedTokens:
        """Reads a crop; it is a copy, for the table is let go of."""
        cut = table.cut(crop)
        where = f"{self.rows.name(shard)}, model '{table.model_id(crop.window)}'"
        if self.max_positions is not None:
            check_positions(cut.positions.max(0).tolist(), self.max_positions, where)
        if not np.isfinite(cut.tokens).all():
            raise DatasetError(f"{where}: a weight is not finite. The file is damaged; tokenize this model again")
        return cut.detached(key)


def _window_key(model_id: str, token_start: int) -> int:
    """63 bits that name a window, wherever in the dataset it lies."""
    digest = hashlib.blake2b(f"{token_start} {model_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
