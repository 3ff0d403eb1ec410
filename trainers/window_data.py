"""Crops of tokenized models, read as views on the Arrow buffers: `crops.py` names crops, `WindowDataset` reads."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_scripts.errors import one_line

from .crops import Crop


SPLITS = ("train", "validation")
SEGMENT_COLUMNS = ("segment_layer", "segment_position", "segment_stride", "segment_length")
COLUMNS = ("model_id", "token_start", "num_tokens", "tokens", "valid_entries", *SEGMENT_COLUMNS)


class DatasetError(ValueError):
    """A tokenized dataset that cannot be trained on; the message names the split, the row and the remedy."""


def load_windows(dataset: str, revision: str | None = None) -> datasets.DatasetDict:
    """The splits `train` and `validation` of a tokenized dataset: a folder written by `hf-wsl tokenize`, or a Hub id.

    A folder's Parquet files are named one by one. `load_dataset(folder, "windows")` finds them through the card, and
    then its cache knows the folder by its name alone: after a second `hf-wsl tokenize` it would give the windows of
    the first.

    Raises:
        DatasetError: it cannot be loaded, or has no training windows.
    """
    folder = Path(dataset).expanduser()
    try:
        splits = _load_folder(folder) if folder.is_dir() else _load_from_hub(dataset, revision)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid) as error:
        raise DatasetError(f"dataset '{dataset}' cannot be read: {error.__cause__ or error}") from error
    if "train" not in splits or len(splits["train"]) == 0:
        raise DatasetError(f"dataset '{dataset}' has no training windows (splits: {', '.join(splits) or 'none'})")
    return splits


def _load_folder(folder: Path) -> datasets.DatasetDict:
    files = {split: sorted(map(str, folder.glob(f"windows/{split}-*.parquet"))) for split in SPLITS}
    if not files["train"]:
        raise DatasetError(
            f"dataset '{folder}' has no windows/train-*.parquet. Write the folder with `hf-wsl tokenize`"
        )
    return datasets.load_dataset("parquet", data_files={split: found for split, found in files.items() if found})


def _load_from_hub(dataset: str, revision: str | None) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(dataset, "windows", revision=revision)
    except datasets.exceptions.DatasetGenerationError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"dataset '{dataset}' is neither a folder nor a dataset on the Hub: {error}") from error
    except Exception as error:  # of the client, without a common class; ValueError: there is no config `windows`
        raise DatasetError(
            f"dataset '{dataset}' cannot be loaded from the Hub ({type(error).__name__}: {one_line(error)}). It needs "
            "the config 'windows' that `hf-wsl tokenize` writes, and a connection"
        ) from error


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
        missing = [name for name in COLUMNS if name not in rows.column_names]
        if missing:
            raise DatasetError(
                f"split '{split}': column '{missing[0]}' is missing (found: {', '.join(rows.column_names)}). "
                "Write the dataset with `hf-wsl tokenize`"
            )
        if len(rows) == 0:
            raise DatasetError(f"split '{split}' holds no windows")
        # A shuffled or filtered dataset reads through an index; the views below see the table itself.
        self.rows = rows if rows._indices is None else rows.flatten_indices()
        self.pad_to = pad_to
        self.split = split
        self._open()
        self.num_tokens = np.concatenate([chunk.lengths for chunk in self._tokens.chunks])  # [rows]
        self.token_size = self._tokens.chunks[0].width
        self._check_rows()

    def _open(self) -> None:
        self._tokens = _ListColumn(self.rows, "tokens")
        self._valid = _ListColumn(self.rows, "valid_entries")
        self._segments = [_ListColumn(self.rows, name) for name in SEGMENT_COLUMNS]
        self._token_start = self.rows.data.column("token_start").to_numpy()

    def _check_rows(self) -> None:
        expected = {"num_tokens": self.rows.data.column("num_tokens").to_numpy()}
        expected["valid_entries"] = self._valid.all_lengths()
        expected["segment_length"] = self._segments[-1].sums()
        for name, count in expected.items():
            wrong = np.flatnonzero(count != self.num_tokens)
            if len(wrong):
                row = int(wrong[0])
                raise DatasetError(
                    f"split '{self.split}', row {row} (model '{self.model_id(row)}'): {self.num_tokens[row]} tokens "
                    f"but {name} gives {count[row]}. The file is damaged; tokenize this model again"
                )
        if not self.num_tokens.all():
            row = int(np.flatnonzero(self.num_tokens == 0)[0])
            raise DatasetError(f"split '{self.split}', row {row} (model '{self.model_id(row)}') holds no tokens")

    def __getstate__(self) -> dict[str, Any]:
        # Views would travel to a spawned worker as copies of the whole table; the worker maps the file anew.
        views = ("_tokens", "_valid", "_segments", "_token_start")
        return {key: value for key, value in self.__dict__.items() if key not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def model_id(self, row: int) -> str:
        return self.rows.data.column("model_id")[row].as_py()

    def highest_positions(self) -> tuple[int, int, int]:
        """The largest n, l and k of the split: what learned position tables must hold."""
        layer, position, stride, length = (
            np.concatenate([chunk.values[chunk.offsets[0] : chunk.offsets[-1]] for chunk in column.chunks])
            for column in self._segments
        )
        highest_k = position + (np.maximum(length, 1) - 1) // stride
        return int((self._token_start + self.num_tokens).max()) - 1, int(layer.max()), int(highest_k.max())

    def window(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A whole window without a copy: tokens `[num_tokens, d_t]` as stored, valid entries uint16 `[num_tokens]`."""
        return self._tokens.row(row), self._valid.row(row)

    def __getitem__(self, crop: Crop) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([crop]).items()}

    def __getitems__(self, crops: list[Crop]) -> dict[str, torch.Tensor]:
        """Reads a batch.

        Returns:
            tokens `[batch, pad_to, d_t]` as stored, zero where padded; valid_entries int32 `[batch, pad_to]`;
            positions int64 `[batch, pad_to, 3]`, zero where padded; window int64 `[batch]`.
        """
        shape = (len(crops), self.pad_to or max(crop.length for crop in crops))
        tokens = np.zeros((*shape, self.token_size), self._tokens.dtype)
        valid = np.zeros(shape, np.int32)
        positions = np.zeros((*shape, 3), np.int64)
        for i, crop in enumerate(crops):
            part = slice(crop.start, crop.start + crop.length)
            tokens[i, : crop.length] = self._tokens.row(crop.window)[part]
            valid[i, : crop.length] = self._valid.row(crop.window)[part]
            self._positions(crop, positions[i, : crop.length])
        return {
            "tokens": torch.from_numpy(tokens),
            "valid_entries": torch.from_numpy(valid),
            "positions": torch.from_numpy(positions),
            "window": torch.tensor([crop.window for crop in crops]),
        }

    def _positions(self, crop: Crop, out: np.ndarray) -> None:
        """Writes [n, l, k] of a crop: within a segment, k = position + j // stride for its j-th token."""
        layer, position, stride, length = (column.row(crop.window) for column in self._segments)
        ends = np.cumsum(length, dtype=np.int64)
        index = np.arange(crop.start, crop.start + crop.length)
        segment = np.searchsorted(ends, index, side="right")
        within = index - (ends - length)[segment]
        out[:, 0] = self._token_start[crop.window] + index
        out[:, 1] = layer[segment]
        out[:, 2] = position[segment] + within // stride[segment]


class _ListColumn:
    """Rows of a list column as numpy views, chunk by chunk; no Arrow object is made per row."""

    def __init__(self, rows: datasets.Dataset, name: str) -> None:
        self.chunks = [_ListChunk(chunk, name) for chunk in rows.data.column(name).chunks if len(chunk)]
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


def make_loader(
    dataset: WindowDataset, batches: Sampler[list[Crop]] | list[list[Crop]], num_workers: int
) -> DataLoader:
    """A DataLoader over named crops. It has a generator of its own: the global one then stays as a resume left it."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_read,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl+C reaches the whole process group; the trainer saves and stops, which takes its readers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_read(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch
