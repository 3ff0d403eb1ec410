"""Runs a function over tasks in this process or in several, and leaves none of them behind when this one is killed."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import pyarrow as pa
import torch

from .errors import WorkerError


Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """As many torch threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> AbstractContextManager[None]:
    """One torch thread within the block. More of them round sums in an order that depends on the number of cores, and
    on small tensors or a busy machine they wait for each other longer than they work.

    Tokenizing 136 public models on two busy cores: 4 to 10 s with one thread, 20 to 27 s with two.
    """
    return torch_threads(1)


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int, preload: str
) -> Iterator[Result]:
    """Yields `function(task)` for all tasks, in the order in which they end.

    Args:
        function: a module-level function; it and the tasks are pickled where there are several processes.
        tasks: all that is to be done.
        num_workers: processes; with 1, or one task, everything happens in this process.
        preload: module that the server of the worker processes imports once, for all of them.

    Raises:
        WorkerError: a worker process died (out of memory, most often).
        Exception: what `function` raises; tasks not yet begun are dropped.
    """
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        yield from map(function, tasks)
        return
    # Not "fork": a copy of a process whose torch threads hold locks hangs. The server has run nothing yet.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([preload])
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(logging.getLogger().getEffectiveLevel(),)
    )
    try:
        for future in as_completed([pool.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "A worker process died, most likely for lack of memory. What is done is kept: run the same command again, "
            "with a smaller num_workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(log_level: int) -> None:
    logging.basicConfig(level=log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; the parent ends its workers
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """An executor's workers wait for tasks for ever when their parent is killed, so they watch it."""
    multiprocessing.parent_process().join()
    os._exit(1)
