"""Rows of the config `windows` as views on Arrow buffers, and the crops that are cut from them.

The map-style dataset (`window_data.py`) and the stream (`window_stream.py`) read through this one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from .crops import Crop


SEGMENT_COLUMNS = ("segment_layer", "segment_position", "segment_stride", "segment_length")
COLUMNS = ("model_id", "token_start", "num_tokens", "tokens", "valid_entries", *SEGMENT_COLUMNS)


class DatasetError(ValueError):
    """A tokenized dataset that cannot be trained on; the message names the split, the row and the remedy."""


@dataclass(frozen=True)
class CroppedTokens:
    """What a crop holds.

    Attributes:
        tokens: `[length, d_t]` as stored; a view on the table.
        valid_entries: uint16 `[length]`; a view on the table.
        positions: int64 `[length, 3]`.
        window: what the crop calls its window.
    """

    tokens: np.ndarray
    valid_entries: np.ndarray
    positions: np.ndarray
    window: int

    def detached(self, window: int) -> CroppedTokens:
        """A copy under another window's name that does not keep the table in memory."""
        return CroppedTokens(self.tokens.copy(), self.valid_entries.copy(), self.positions, window)


def collate(crops: Sequence[CroppedTokens], pad_to: int = 0) -> dict[str, torch.Tensor]:
    """Makes a batch; crops are padded to `pad_to` tokens, or (0) to the longest, with tokens that hold no weight.

    Returns:
        tokens `[batch, pad_to, d_t]` as stored, zero where padded; valid_entries int32 `[batch, pad_to]`; positions
        int64 `[batch, pad_to, 3]`, zero where padded; window int64 `[batch]`.
    """
    shape = (len(crops), pad_to or max(len(crop.tokens) for crop in crops))
    tokens = np.zeros((*shape, crops[0].tokens.shape[1]), crops[0].tokens.dtype)
    valid = np.zeros(shape, np.int32)
    positions = np.zeros((*shape, 3), np.int64)
    for i, crop in enumerate(crops):
        length = len(crop.tokens)
        tokens[i, :length] = crop.tokens
        valid[i, :length] = crop.valid_entries
        positions[i, :length] = crop.positions
    return {
        "tokens": torch.from_numpy(tokens),
        "valid_entries": torch.from_numpy(valid),
        "positions": torch.from_numpy(positions),
        "window": torch.tensor([crop.window for crop in crops]),
    }


class WindowTable:
    """Windows of an Arrow table, read without a copy and without an Arrow object per row.

    Args:
        table: at least one row, with `COLUMNS`.
        where: "split 'train'" or narrower, for error messages.
        first_row: number of the table's first row there, for error messages.

    Attributes:
        token_size: d_t, entries per token.
        num_tokens: int64 `[rows]`, tokens of each window.

    Raises:
        DatasetError: a missing column, or a row whose columns contradict each other.
    """

    def __init__(self, table: pa.Table, where: str, first_row: int = 0) -> None:
        check_columns(table.column_names, where)
        self._table = table
        self._where = where
        self._first_row = first_row
        self._tokens = _ListColumn(table, "tokens")
        self._valid = _ListColumn(table, "valid_entries")
        self._segments = [_ListColumn(table, name) for name in SEGMENT_COLUMNS]
        self._token_start = table.column("token_start").to_numpy()
        self.num_tokens = np.concatenate([chunk.lengths for chunk in self._tokens.chunks])  # [rows]
        self.token_size = self._tokens.chunks[0].width
        self._check_rows()

    def _check_rows(self) -> None:
        expected = {"num_tokens": self._table.column("num_tokens").to_numpy()}
        expected["valid_entries"] = self._valid.all_lengths()
        expected["segment_length"] = self._segments[-1].sums()
        for name, count in expected.items():
            wrong = np.flatnonzero(count != self.num_tokens)
            if len(wrong):
                row = int(wrong[0])
                raise DatasetError(
                    f"{self._name(row)}: {self.num_tokens[row]} tokens but {name} gives {count[row]}. The file is "
                    "damaged; tokenize this model again"
                )
        if not self.num_tokens.all():
            raise DatasetError(f"{self._name(int(np.flatnonzero(self.num_tokens == 0)[0]))} holds no tokens")

    def _name(self, row: int) -> str:
        return f"{self._where}, row {self._first_row + row} (model '{self.model_id(row)}')"

    def __len__(self) -> int:
        return len(self.num_tokens)

    def model_id(self, row: int) -> str:
        return self._table.column("model_id")[row].as_py()

    def token_start(self, row: int) -> int:
        return int(self._token_start[row])

    def highest_positions(self) -> tuple[int, int, int]:
        """The largest n, l and k of the table: what learned position tables must hold."""
        layer, position, stride, length = (
            np.concatenate([chunk.values[chunk.offsets[0] : chunk.offsets[-1]] for chunk in column.chunks])
            for column in self._segments
        )
        highest_k = position + (np.maximum(length, 1) - 1) // stride
        return int((self._token_start + self.num_tokens).max()) - 1, int(layer.max()), int(highest_k.max())

    def window(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole window without a copy: tokens `[num_tokens, d_t]` as stored, valid entries uint16 `[num_tokens]`."""
        return self._tokens.row(row), self._valid.row(row)

    def cut(self, crop: Crop) -> CroppedTokens:
        """Reads a crop; tokens and valid entries are views."""
        part = slice(crop.start, crop.start + crop.length)
        tokens, valid = self.window(crop.window)
        return CroppedTokens(tokens[part], valid[part], self._positions(crop), crop.window)

    def _positions(self, crop: Crop) -> np.ndarray:
        """[n, l, k] of a crop's tokens: within a segment, k = position + j // stride for its j-th token."""
        layer, position, stride, length = (column.row(crop.window) for column in self._segments)
        ends = np.cumsum(length, dtype=np.int64)
        index = np.arange(crop.start, crop.start + crop.length)
        segment = np.searchsorted(ends, index, side="right")
        within = index - (ends - length)[segment]
        n = self._token_start[crop.window] + index
        return np.stack([n, layer[segment], position[segment] + within // stride[segment]], axis=1)


def every(stride: int, windows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every `stride`-th token of windows (tokens and valid entries), the count running on from one to the next."""
    first = 0
    for tokens, valid in windows:
        yield tokens[first::stride], valid[first::stride]
        first = (first - len(tokens)) % stride


def check_columns(names: Sequence[str], where: str) -> None:
    """Raises DatasetError where a column that training reads is missing."""
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise DatasetError(
            f"{where}: column '{missing[0]}' is missing (found: {', '.join(names)}). Write the dataset with "
            "`hf-wsl tokenize`"
        )


def check_positions(highest: Sequence[int], max_positions: Sequence[int], where: str) -> None:
    """Raises DatasetError where a position n, l or k is beyond its learned table of `max_positions` entries."""
    for name, value, size in zip("nlk", highest, max_positions, strict=True):
        if value >= size:
            raise DatasetError(
                f"{where} has positions up to {name} = {value}, the learned table holds {size} (max_positions "
                f"{list(max_positions)}). Use --model.position_encoding sinusoidal, or larger --model.max_positions "
                "'[n, l, k]'"
            )


class _ListColumn:
    """Rows of a list column as numpy views, chunk by chunk; no Arrow object is made per row."""

    def __init__(self, table: pa.Table, name: str) -> None:
        self.chunks = [_ListChunk(chunk, name) for chunk in table.column(name).chunks if len(chunk)]
        self._first_row = np.cumsum([0] + [len(chunk.lengths) for chunk in self.chunks])
        self.dtype = self.chunks[0].values.dtype

    def row(self, row: int) -> np.ndarray:
        at = int(np.searchsorted(self._first_row, row, side="right")) - 1
        chunk = self.chunks[at]
        offset = row - self._first_row[at]
        return chunk.values[chunk.offsets[offset] : chunk.offsets[offset + 1]]

    def all_lengths(self) -> np.ndarray:
        return np.concatenate([chunk.lengths for chunk in self.chunks])

    def sums(self) -> np.ndarray:
        """The sum of each row's values, int64 `[rows]`."""
        totals = [np.concatenate([[0], np.cumsum(chunk.values, dtype=np.int64)]) for chunk in self.chunks]
        return np.concatenate(
            [total[c.offsets[1:]] - total[c.offsets[:-1]] for total, c in zip(totals, self.chunks, strict=True)]
        )


class _ListChunk:
    """One chunk: `values` flat, or `[items, width]` for lists of fixed-size lists, and `offsets` into it."""

    def __init__(self, chunk: pa.ListArray | pa.LargeListArray, name: str) -> None:
        if not pa.types.is_list(chunk.type) and not pa.types.is_large_list(chunk.type):
            raise DatasetError(
                f"column '{name}' is {chunk.type}, not a list. Write the dataset with `hf-wsl tokenize`"
            )
        self.offsets = chunk.offsets.to_numpy()
        self.lengths = np.diff(self.offsets).astype(np.int64)
        values = chunk.values  # of the whole buffer: the offsets count from its beginning
        self.width = 1
        if pa.types.is_fixed_size_list(values.type):
            self.width = values.type.list_size
            flat = values.values.slice(values.offset * self.width, len(values) * self.width)
            self.values = flat.to_numpy(zero_copy_only=True).reshape(-1, self.width)
        elif pa.types.is_nested(values.type):
            raise DatasetError(
                f"column '{name}' holds {values.type}; tokens are fixed-size lists of float16 or float32"
            )
        else:
            self.values = values.to_numpy(zero_copy_only=True)
