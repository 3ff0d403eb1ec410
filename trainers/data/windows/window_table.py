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
from .reading import BatchMemory


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


def collate(crops: Sequence[CroppedTokens], memory: BatchMemory, pad_to: int = 0) -> dict[str, torch.Tensor]:
    """Makes a batch; crops are padded to `pad_to` tokens, or (0) to the longest, with tokens that hold no weight.

    Returns:
        tokens `[batch, pad_to, d_t]` as stored, zero where padded; valid_entries int32 `[batch, pad_to]`; positions
        int64 `[batch, pad_to, 3]`, zero where padded; window int64 `[batch]`.
    """
    length = pad_to or max(len(crop.tokens) for crop in crops)
    batch, arrays = memory.batch(len(crops), length, crops[0].tokens.shape[1], crops[0].tokens.dtype)
    for i, crop in enumerate(crops):
        for name, array in arrays.items():
            part = getattr(crop, name)
            array[i, : len(part)] = part
            array[i, len(part) :] = 0
    batch["window"] = torch.tensor([crop.window for crop in crops])
    return batch


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
        self._memory = BatchMemory()
        self._first_row = first_row
        self._tokens = _ListColumn(table, "tokens")
        self._valid = _ListColumn(table, "valid_entries")
        self._segments = [_ListColumn(table, name) for name in SEGMENT_COLUMNS]
        self._token_start = table.column("token_start").to_numpy()
        self.num_tokens = self._tokens.lengths
        self.token_size = self._tokens.width
        self._check_rows()
        # Tokens are numbered over all windows, and segments, which are few beside the tokens, lie in one array.
        self._first_token = np.cumsum(self.num_tokens) - self.num_tokens
        self._layer, self._position, self._stride, length = (column.joined() for column in self._segments)
        self._segment_end = np.cumsum(length, dtype=np.int64)
        self._segment_begin = self._segment_end - length

    def _check_rows(self) -> None:
        expected = {"num_tokens": self._table.column("num_tokens").to_numpy()}
        expected["valid_entries"] = self._valid.lengths
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
        length = self._segment_end - self._segment_begin
        highest_k = self._position + (np.maximum(length, 1) - 1) // self._stride
        return int((self._token_start + self.num_tokens).max()) - 1, int(self._layer.max()), int(highest_k.max())

    def window(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole window without a copy: tokens `[num_tokens, d_t]` as stored, valid entries uint16 `[num_tokens]`."""
        stop = int(self.num_tokens[row])
        return self._tokens.part(row, 0, stop), self._valid.part(row, 0, stop)

    def cut(self, crop: Crop) -> CroppedTokens:
        """Reads a crop; tokens and valid entries are views."""
        row, start, stop = crop.window, crop.start, crop.start + crop.length
        positions = np.empty((1, crop.length, 3), np.int64)
        self._write_positions(positions, *(np.array([value]) for value in crop))
        tokens, valid = self._tokens.part(row, start, stop), self._valid.part(row, start, stop)
        return CroppedTokens(tokens, valid, positions[0], row)

    def read(self, crops: Sequence[Crop], pad_to: int = 0) -> dict[str, torch.Tensor]:
        """Reads a batch, as `collate` would make it of the crops one by one."""
        rows, starts, lengths = np.array(crops, np.int64).T
        length = pad_to or int(lengths.max())
        batch, arrays = self._memory.batch(len(crops), length, self.token_size, self._tokens.dtype)
        self._write_positions(arrays["positions"], rows, starts, lengths)
        padding = (length - lengths).tolist()
        for name, column in (("tokens", self._tokens), ("valid_entries", self._valid)):
            parts = column.parts(rows, starts, lengths)
            if any(padding):
                empty = np.zeros((max(padding), *parts[0].shape[1:]), parts[0].dtype)
                parts = [part for i, crop in enumerate(parts) for part in (crop, empty[: padding[i]])]
            flat = arrays[name].reshape(-1, *parts[0].shape[1:])
            np.concatenate(parts, out=flat)  # one call, for between calls other threads would wait for each other
        for i in np.flatnonzero(lengths < length).tolist():
            arrays["positions"][i, int(lengths[i]) :] = 0
        batch["window"] = torch.from_numpy(rows.copy())
        return batch

    def _write_positions(self, out: np.ndarray, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Writes [n, l, k] of the tokens of crops to `out` `[crops, length, 3]`; behind a shorter crop it is void.

        Within a segment, k = position + j // stride for its j-th token. All crops of a batch at once: for each of them
        there is so little to compute that the calls would take the time.
        """
        size, length, _ = out.shape
        first_n = self._token_start[rows] + starts
        np.add(first_n[:, None], np.arange(length), out=out[:, :, 0])
        # Pieces: crops, cut where segments end.
        begin = self._first_token[rows] + starts
        end = begin + lengths
        first = np.searchsorted(self._segment_end, begin, side="right")
        count = np.searchsorted(self._segment_end, end, side="left") - first + 1
        last = np.cumsum(count) - 1
        crop = np.repeat(np.arange(size), count)
        segment = np.arange(len(crop)) + (first - last + count - 1)[crop]
        sizes = np.minimum(self._segment_end[segment], end[crop])
        sizes -= np.maximum(self._segment_begin[segment], begin[crop])
        sizes[last] += length - lengths
        flat = out.reshape(-1, 3)
        flat[:, 1] = np.repeat(self._layer[segment], sizes)
        place = np.arange(len(flat))
        shift = np.arange(size) * length - begin  # from the number of a token to its place
        origin, stride = self._segment_begin[segment] + shift[crop], self._stride[segment]  # the place where j is 0
        if (stride == 1).all():
            np.add(np.repeat(self._position[segment] - origin, sizes), place, out=flat[:, 2])
        else:
            j = place - np.repeat(origin, sizes)
            np.add(np.repeat(self._position[segment], sizes), j // np.repeat(stride, sizes), out=flat[:, 2])


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
    """Rows of a list column as numpy views; no Arrow object is made per row.

    Attributes:
        lengths: int64 `[rows]`.
        width, dtype: of the items: for tokens, d_t.
    """

    def __init__(self, table: pa.Table, name: str) -> None:
        self._chunks = [_ListChunk(chunk, name) for chunk in table.column(name).chunks if len(chunk)]
        self._chunk_of = np.repeat(np.arange(len(self._chunks)), [len(chunk.lengths) for chunk in self._chunks])
        self._first = np.concatenate([chunk.offsets[:-1] for chunk in self._chunks]).astype(np.int64)
        self.lengths = np.concatenate([chunk.lengths for chunk in self._chunks])
        self.width, self.dtype = self._chunks[0].width, self._chunks[0].values.dtype

    def part(self, row: int, start: int, stop: int) -> np.ndarray:
        """The items `start` to `stop` of a row, a view."""
        first = int(self._first[row])
        return self._chunks[self._chunk_of[row]].values[first + start : first + stop]

    def parts(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """So many items from `starts` on of some rows, views."""
        firsts = self._first[rows] + starts
        places = zip(self._chunk_of[rows].tolist(), firsts.tolist(), (firsts + lengths).tolist(), strict=True)
        return [self._chunks[chunk].values[first:end] for chunk, first, end in places]

    def joined(self) -> np.ndarray:
        """The items of all rows, one after the other; a copy where there are several chunks."""
        return np.concatenate([chunk.values[chunk.offsets[0] : chunk.offsets[-1]] for chunk in self._chunks])

    def sums(self) -> np.ndarray:
        """The sum of each row's values, int64 `[rows]`."""
        totals = np.concatenate([[0], np.cumsum(self.joined(), dtype=np.int64)])
        ends = np.cumsum(self.lengths)
        return totals[ends] - totals[ends - self.lengths]


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
