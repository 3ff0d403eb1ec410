"""The windows of a split as a map-style dataset: `crops.py` names crops, `WindowDataset` reads them from the disk."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .crops import Crop
from .reading import look_ahead
from .window_table import DatasetError, WindowTable, check_columns, every


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


def make_loader(
    dataset: WindowDataset, batches: Iterable[Sequence[Crop]], num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of named crops, in their order, read ahead by `num_workers` threads (0: when they are asked for)."""
    return look_ahead((functools.partial(dataset.__getitems__, crops) for crops in batches), num_workers)
