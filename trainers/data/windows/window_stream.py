"""Training windows as a stream, for datasets that do not fit on the disk: what a process reads, in which order.

The order is a pure function of the seed and of a place, so a run that was interrupted goes on where it stopped:

* Every epoch the shards (Parquet files, or row groups) come in a new order and are dealt out like cards to the
  readers, which are the loader workers of all processes. A reader that is done with its share of an epoch goes on with
  its share of the next one.
* A reader shuffles by blocks: the crops of so many consecutive windows of its share come in random order, while the
  next block is read, one window for each that is given out. Two blocks are in memory.
* Where a crop lies depends on the seed, the window and the visit alone, as with windows on the disk.

The shuffle buffer of `datasets` mixes a little further than two blocks, but what it holds depends on all that was read
before, so a run that resumes could not refill it.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .batch_memory import BatchMemory
from .crops import Crop, crop_starts
from .window_files import WindowFiles, explained
from .window_table import CroppedTokens, DatasetError, WindowTable, check_positions, collate


class Place(NamedTuple):
    """How far a reader has come: `taken` crops of the block that begins at row `row` of its share's shard `shard`."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0


class WindowStream(IterableDataset):
    """Endless batches of crops for one process, read by `len(places)` loader workers (or by the process itself).

    Args:
        rows: the training split.
        window_size: tokens of a crop (fewer where the window is shorter); batches are padded to it.
        batch_size: crops of a batch.
        seed: of the order and of the crops.
        buffer_size: crops of a block.
        crops_per_window: crops that are taken from a window whenever it is read; so many visits are one epoch here.
        rank, world_size: this process among all.
        places: where each reader of this process begins.
        first_reader: the reader that gives the first batch; the others follow in turn.
        max_positions: sizes of the learned position tables, if there are any.

    Raises:
        DatasetError: fewer shards than readers.
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
        places: Sequence[Place] = (Place(),),
        first_reader: int = 0,
        max_positions: Sequence[int] | None = None,
    ) -> None:
        self.rows = rows
        self.window_size = window_size
        self.batch_size = batch_size
        self.seed = seed
        self.crops_per_window = crops_per_window
        self.windows_per_block = max(1, buffer_size // crops_per_window)
        self.first_lane = rank * len(places)  # lane: number of a reader among those of all processes
        self.num_lanes = world_size * len(places)
        self.places = list(places)
        self.first_reader = first_reader
        self.max_positions = max_positions
        if rows.num_shards < self.num_lanes:
            raise DatasetError(
                f"the training split has {rows.num_shards} row groups, too few for {self.num_lanes} readers "
                f"({world_size} processes of {len(places)}). Lower --num_workers, or read so small a dataset without "
                "--streaming"
            )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | str]:
        """Yields batches (see `collate`) with `place` int64 `[4]`, the `Place` that the reader has come to.

        Where reading fails, the message of the DatasetError comes as the last item: raised in a worker, it would come
        out with the worker's traceback in its text, and torch would wait for every worker until it is killed.
        """
        worker = get_worker_info()
        reader = (self.first_reader + (worker.id if worker else 0)) % len(self.places)
        batch: list[CroppedTokens] = []
        memory = BatchMemory()
        try:
            for crop, place in self._crops(self.first_lane + reader, self.places[reader]):
                batch.append(crop)
                if len(batch) == self.batch_size:
                    yield {**collate(batch, memory, self.window_size), "place": torch.tensor(place)}
                    batch = []
        except DatasetError as error:
            yield str(error)

    def _crops(self, lane: int, start: Place) -> Iterator[tuple[CroppedTokens, Place]]:
        """The crops of a lane in the order in which they are given out, each with the place after it."""
        blocks = groupby(self._windows(lane, start), key=itemgetter(0))  # lazy: a block is read as it is asked for
        beginning, windows = next(blocks)
        block = [crop for _, crops in windows for crop in crops]
        taken = start.taken
        while True:
            next_beginning, windows = next(blocks)
            next_block: list[CroppedTokens] = []
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, lane, *beginning))))
            for at, index in enumerate(random.permutation(len(block))):
                if at % self.crops_per_window == 0:
                    next_block += [crop for _, crops in islice(windows, 1) for crop in crops]
                if at >= taken:
                    yield block[index], beginning._replace(taken=at + 1)
            next_block += [crop for _, crops in windows for crop in crops]
            beginning, block, taken = next_beginning, next_block, 0

    def _windows(self, lane: int, start: Place) -> Iterator[tuple[Place, list[CroppedTokens]]]:
        """The windows of a lane as they are read: the beginning of the block that each belongs to, and its crops."""
        epoch, first_shard, first_row, _ = start
        while True:
            share = self._order(epoch)[lane :: self.num_lanes]
            count = 0
            for at, first, table in self.rows.tables(share[first_shard:].tolist(), first_row):
                shard = first_shard + at
                crops = self._crops_of(table, epoch)
                for row in range(max(0, first_row - first) if at == 0 else 0, len(table)):
                    if count % self.windows_per_block == 0:
                        beginning = Place(epoch, shard, first + row)
                    count += 1
                    with explained(int(share[shard])):
                        cut = [self._cut(table, crop, key) for crop, key in crops[row]]
                    yield beginning, cut
            if count == 0:
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

    def _cut(self, table: WindowTable, crop: Crop, key: int) -> CroppedTokens:
        """Reads a crop; it is a copy, for the table is let go of."""
        cut = table.cut(crop)
        if self.max_positions is not None:
            where = f"split 'train', model '{table.model_id(crop.window)}'"
            check_positions(cut.positions.max(0).tolist(), self.max_positions, where)
        return cut.detached(key)


def stream_loader(stream: WindowStream, num_workers: int) -> DataLoader:
    """A DataLoader over a stream's batches; the number of workers is that of the stream's places, or 0 for one."""
    return DataLoader(
        stream,
        batch_size=None,  # the stream makes batches itself
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the global one stays as a resume left it
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl+C reaches the whole process group; the trainer saves and stops, which takes its readers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _window_key(model_id: str, token_start: int) -> int:
    """63 bits that name a window, wherever in the dataset it lies."""
    digest = hashlib.blake2b(f"{token_start} {model_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
