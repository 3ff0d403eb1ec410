"""The memory that batches of crops are read into."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import get_worker_info


class BatchMemory:
    """Gives room for batches, and takes back the room of those that nobody holds any more.

    Fresh memory takes longer to fill: the system clears every page before it is written. Where there is a GPU, torch
    keeps pinned memory itself; a batch that was pinned later would be copied once more. A worker process of a stream
    pins nothing, for its batches move to another process anyway.
    """

    def __init__(self) -> None:
        self._free: dict[str, list[np.ndarray]] = {}

    def batch(
        self, size: int, length: int, token_size: int, dtype: np.dtype
    ) -> tuple[dict[str, torch.Tensor], Mapping[str, np.ndarray]]:
        """The tensors of a batch (see `collate`) without `window`, and the same memory as arrays, to be filled."""
        shapes = {
            "tokens": ((size, length, token_size), np.dtype(dtype)),
            "valid_entries": ((size, length), np.dtype(np.int32)),
            "positions": ((size, length, 3), np.dtype(np.int64)),
        }
        if torch.cuda.is_available() and get_worker_info() is None:
            batch = {
                name: torch.empty(shape, dtype=getattr(torch, kind.name), pin_memory=True)
                for name, (shape, kind) in shapes.items()
            }
            return batch, {name: tensor.numpy() for name, tensor in batch.items()}
        arrays = {name: self._array(name, shape, kind) for name, (shape, kind) in shapes.items()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, arrays

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        free = self._free.setdefault(name, [])
        try:
            room = free.pop()
        except IndexError:
            room = None
        if room is None or room.shape != shape or room.dtype != dtype:
            room = np.empty(shape, dtype)
        array = room.view()  # that the tensor of this batch holds, and nothing else
        weakref.finalize(array, free.append, room).atexit = False
        return array
