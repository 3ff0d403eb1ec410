"""The threads that read ahead, and the memory that batches are read into."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch


Result = TypeVar("Result")
AHEAD = 2  # results that a thread has ready before they are asked for


def look_ahead(jobs: Iterable[Callable[[], Result]], num_threads: int) -> Iterator[Result]:
    """The results of jobs, in their order, by threads that run ahead of who takes them.

    Threads and not processes: to read windows is to copy, to decompress and to fetch, which Python lets run side by
    side, while from one process to another they would be copied twice more, and through a shared memory that
    containers keep small.

    Args:
        jobs: taken by the caller's thread, as they are needed.
        num_threads: 0 does a job when its result is asked for.
    """
    if num_threads == 0:
        for job in jobs:
            yield job()
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="windows")
    ahead: deque[Future] = deque()
    try:
        for job in jobs:
            ahead.append(pool.submit(job))
            if len(ahead) > AHEAD * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class BatchMemory:
    """Gives room for batches, and takes back the room of those that nobody holds any more.

    Fresh memory takes longer to fill: the system clears every page before it is written. Where there is a GPU, torch
    keeps pinned memory itself; a batch that was pinned later would be copied once more.
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
        if torch.cuda.is_available():
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
