"""The windows of a split as a map-style dataset: `crops.py` names crops, `WindowDataset` reads them from the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .crops import Crop
from .window_table import DatasetError, WindowTable, check_columns, every


_BATCHES_AHEAD = 2  # that a thread has read before they are asked for


class WindowDataset(Dataset):
    """Map-style dataset of crops over one split; its item is a batch, asked for as a list of `Crop`.

    Args:
        rows: rows of the `windows` config.
        pad_to: crops are padded to this many tokens with tokens that hold no weight; 0 = to the longest of the batch.
        split: name for error messages.

    Attributes:
        token_size: d_t, entries per token.
        num_tokens: int64 `[rows]`, tokens of each window.

    Raises:
        DatasetError: a missing column, no rows, or a row whose columns contradict each other.
    """

    def __init__(self, rows: datasets.Dataset, pad_to: int = 0, split: str = "train") -> None:
        check_columns(rows.column_names, f"split '{split}'")
        if len(rows) == 0:
            raise DatasetError(f"split '{split}' holds no windows")
        # A shuffled or filtered dataset reads through an index; the views below see the table itself.
        self.rows = rows if rows._indices is None else rows.flatten_indices()
        self.pad_to = pad_to
        self.split = split
        self._table = WindowTable(self.rows.data.table, f"split '{split}'")
        self.num_tokens = self._table.num_tokens
        self.token_size = self._table.token_size

    def __getstate__(self) -> dict[str, Any]:
        # Views would travel to a spawned worker as copies of the whole table; the worker maps the file anew.
        return {key: value for key, value in self.__dict__.items() if key != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = WindowTable(self.rows.data.table, f"split '{self.split}'")

    def __len__(self) -> int:
        return len(self.rows)

    def highest_positions(self) -> tuple[int, int, int]:
        """The largest n, l and k of the split: what learned position tables must hold."""
        return self._table.highest_positions()

    def window(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole window without a copy: tokens `[num_tokens, d_t]` as stored, valid entries uint16 `[num_tokens]`."""
        return self._table.window(row)

    def sample(self, max_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """About `max_tokens` evenly spaced tokens of the split: tokens `[n, d_t]`, valid entries `[n]` per window."""
        stride = max(1, -(-int(self.num_tokens.sum()) // max_tokens))
        return every(stride, map(self.window, range(len(self))))

    def __getitem__(self, crop: Crop) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([crop]).items()}

    def __getitems__(self, crops: list[Crop]) -> dict[str, torch.Tensor]:
        """Reads a batch, see `collate`."""
        return self._table.read(crops, self.pad_to)


def make_loader(dataset: WindowDataset, batches: Iterable[Sequence[Crop]], num_workers: int) -> CropLoader:
    """Batches of named crops, in their order."""
    return CropLoader(dataset, batches, num_workers)


class CropLoader:
    """Reads batches of crops, in order, by threads that run ahead of who takes them.

    Threads and not processes: to read a batch is to copy mapped memory, which Python lets run side by side, while from
    one process to another the batch would be copied twice more, four times slower in all, and through a shared memory
    that containers keep small.

    Args:
        dataset: whose `__getitems__` reads a batch.
        batches: crops of each batch.
        num_workers: threads; 0 reads a batch when it is asked for.
    """

    def __init__(self, dataset: Dataset, batches: Iterable[Sequence[Crop]], num_workers: int) -> None:
        self.dataset = dataset
        self.batches = batches
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if self.num_workers == 0:
            yield from map(self.dataset.__getitems__, self.batches)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="crops")
        ahead: deque[Future] = deque()
        try:
            for crops in self.batches:
                ahead.append(pool.submit(self.dataset.__getitems__, crops))
                if len(ahead) > _BATCHES_AHEAD * self.num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
