"""Batches of windows on several CPU threads, a batch each: they wait for each other once, not at every operation.

Within an operation threads share work of a fraction of a millisecond and meet at its end; a core that something else
runs on then holds all of them up, and what one thread does alone (Python, small operations) none of them shares.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


# glibc gives freed memory back to the system above a threshold that grows with the largest block that was mapped and
# freed, up to 32 MB: until one was, temporaries of every layer get fresh pages, a third of the time of a first run.
LARGEST_BLOCK = (32 << 20) - (8 << 10)
CACHED_BYTES = 6 << 20  # of the widest activations of a pass: more leave the cache, and fresh pages for them cost time


def raise_trim_threshold() -> None:
    """Makes the C library keep what temporaries free, see `LARGEST_BLOCK`; touches no page."""
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8)


def num_workers(model: PreTrainedModel, num_rows: int) -> int:
    """Batches to be run at a time: one, unless the model is in bfloat16 on the CPU."""
    return min(torch.get_num_threads(), num_rows) if _is_cached(model) else 1


def rows_per_pass(model: PreTrainedModel, row_length: int, batch_size: int) -> int:
    """Rows that a batch holds at most: `batch_size`, or of a model in bfloat16 on the CPU what stays in the cache."""
    if not _is_cached(model):
        return batch_size
    return max(1, min(batch_size, CACHED_BYTES // (2 * model.config.intermediate_size * row_length)))


def batch_sizes(num_rows: int, batch_size: int, workers: int) -> list[int]:
    """Sizes of batches of at most `batch_size` rows, in order; as many and as large for every one of the workers."""
    if workers <= 1:
        return [min(batch_size, num_rows - first) for first in range(0, num_rows, batch_size)]
    rounds = -(-num_rows // (workers * batch_size))
    count = min(rounds * workers, num_rows)
    return [num_rows // count + (index < num_rows % count) for index in range(count)]


def run_in_order(function: Callable[[Any], Any], batches: Iterable[Any], workers: int) -> Iterator[Any]:
    """`map(function, batches)`, up to `workers` calls at a time; at most one more batch is held than are worked on."""
    if workers <= 1:
        yield from map(function, batches)
        return
    with _single_threaded(workers) as pool:
        waiting: deque[Future] = deque()
        for batch in batches:
            waiting.append(pool.submit(function, batch))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _is_cached(model: PreTrainedModel) -> bool:
    return model.device.type == "cpu" and model.dtype == torch.bfloat16


@contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that share torch's threads among them."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers, "windows", initializer=torch.set_num_threads, initargs=(max(1, threads // workers),)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # each thread has its own number, but new ones take over the last that was set
