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
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datasets_scripts.errors import one_line

from .crops import Crop, crop_start
from .window_data import ignore_interrupts
from .window_table import (
    COLUMNS,
    CroppedTokens,
    DatasetError,
    WindowTable,
    check_positions,
    collate,
)


_ROWS_AT_ONCE = 16  # of a table: enough that what a table costs does not count beside what a window costs


class Place(NamedTuple):
    """How far a reader has come: `taken` crops of the block that begins at row `row` of its share's shard `shard`."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0


class WindowStream(IterableDataset):
    """Endless batches of crops for one process, read by `len(places)` loader workers (or by the process itself).

    Args:
        rows: the training split, streaming.
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
        rows: datasets.IterableDataset,
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
        self.rows = rows.select_columns(list(COLUMNS)).with_format("arrow")
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
        try:
            for crop, place in self._crops(self.first_lane + reader, self.places[reader]):
                batch.append(crop)
                if len(batch) == self.batch_size:
                    yield {**collate(batch, self.window_size), "place": torch.tensor(place)}
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
            for shard in range(first_shard, len(share)):
                for row, table, at in self._read(int(share[shard]), first_row if shard == first_shard else 0):
                    if count % self.windows_per_block == 0:
                        beginning = Place(epoch, shard, row)
                    count += 1
                    yield beginning, self._cut(table, at, epoch)
            if count == 0:
                raise DatasetError("split 'train' has files without windows. Write the dataset with `hf-wsl tokenize`")
            epoch, first_shard, first_row = epoch + 1, 0, 0

    def _order(self, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=(self.seed, epoch)))
        return generator.permutation(self.rows.num_shards)

    def _read(self, shard: int, first_row: int) -> Iterator[tuple[int, WindowTable, int]]:
        """The windows of a shard from a row on: the row in the shard, a table that holds it, the row in that table."""
        seen = 0
        for table in read_shard(self.rows, shard):
            windows = WindowTable(table, f"split 'train', shard {shard}", seen)
            for at in range(max(0, first_row - seen), len(windows)):
                yield seen + at, windows, at
            seen += len(windows)

    def _cut(self, table: WindowTable, row: int, epoch: int) -> list[CroppedTokens]:
        """The crops of a window in an epoch. They are copies: the table is let go of."""
        key = _window_key(table.model_id(row), table.token_start(row))
        num_tokens = int(table.num_tokens[row])
        crops = []
        for visit in range(epoch * self.crops_per_window, (epoch + 1) * self.crops_per_window):
            start = crop_start(self.seed, visit, key, num_tokens, self.window_size)
            cut = table.cut(Crop(row, start, min(self.window_size, num_tokens)))
            if self.max_positions is not None:
                where = f"split 'train', model '{table.model_id(row)}'"
                check_positions(cut.positions.max(0).tolist(), self.max_positions, where)
            crops.append(cut.detached(key))
        return crops


def read_shard(rows: datasets.IterableDataset, shard: int) -> Iterator[pa.Table]:
    """A shard as tables of some windows each. DatasetError where it cannot be read, after the client's own retries."""
    try:
        yield from rows.shard(num_shards=rows.num_shards, index=shard).iter(batch_size=_ROWS_AT_ONCE)
    except Exception as error:  # of the client, Arrow and datasets, without a common class
        raise DatasetError(
            f"split 'train', shard {shard}: cannot be read ({type(error).__name__}: {one_line(error)}). Go on with "
            "--resume_from_checkpoint latest once it can"
        ) from error


def stream_loader(stream: WindowStream, num_workers: int) -> DataLoader:
    """A DataLoader over a stream's batches; the number of workers is that of the stream's places, or 0 for one."""
    return DataLoader(
        stream,
        batch_size=None,  # the stream makes batches itself
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the global one stays as a resume left it
        worker_init_fn=ignore_interrupts,
    )


def _window_key(model_id: str, token_start: int) -> int:
    """63 bits that name a window, wherever in the dataset it lies."""
    digest = hashlib.blake2b(f"{token_start} {model_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
