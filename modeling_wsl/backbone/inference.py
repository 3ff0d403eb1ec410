"""Running a backbone without gradients: a copy with its weights cast once, and batches of windows on CPU threads.

A batch on each of several threads: they wait for each other once, not at every operation. Within an operation threads
share work of a fraction of a millisecond and meet at its end; a core that something else runs on then holds all of
them up, and what one thread does alone (Python, small operations) none of them shares.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..tokens.manifest import check_choice
from .precision import choose_precision


logger = logging.get_logger(__name__)

PRECISIONS = ("auto", "float32", "bfloat16")
MIN_TIMED_WIDTH = 384  # products of narrower matrices are too short for a time that is the same in every process


CACHED_BYTES = 6 << 20  # of the widest activations of a pass: more leave the cache, and fresh pages for them cost time


def autocast_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that an option `autocast_dtype` names.

    Raises:
        ValueError: a name that is none of "bfloat16" and "float16".
    """
    if not isinstance(dtype, str):
        return dtype
    check_choice("autocast_dtype", dtype, ("bfloat16", "float16"))
    return getattr(torch, dtype)


def inference_backbone(
    model: PreTrainedModel, autocast_dtype: torch.dtype | str | None = None, precision: str | None = None
) -> tuple[PreTrainedModel, torch.dtype | None]:
    """A backbone that computes the same as `model` under autocast, to rounding, in less time.

    Autocast casts every weight anew in every forward pass; the copy's are cast once. It shares with `model` the
    parameters that need no cast, and does not follow later changes of the others: make it where it is used, not for
    keeps.

    Args:
        model: a backbone.
        autocast_dtype: to run under autocast to ("bfloat16"); None: as `precision` says.
        precision: "float32", "bfloat16", or "auto": for weights stored in bfloat16 on a CPU the faster of the two,
            which is timed once and logged, and all others as they are; float32 weights are rounded for nobody who has
            not asked for it. None: in the dtype of the weights.

    Returns:
        The copy, and None; or the model itself and the dtype for autocast, where there is nothing to gain (float32,
        weights of that type already) or the weights are offloaded or quantized.
    """
    dtype = autocast_type(autocast_dtype)
    if dtype is None and precision is not None:
        check_choice("precision", precision, PRECISIONS)
        dtype = _dtype_of(model, precision)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if any(parameter.is_meta for parameter in model.parameters()) or not all(
        kind.is_floating_point for kind in dtypes
    ):
        return model, dtype
    if dtype == torch.float32:  # no autocast widens weights
        return (model if dtypes == {dtype} else _copy(model, dtype)), None
    narrow = model.dtype if dtype is None else dtype
    if not dtypes <= {narrow} | ({torch.float32} if dtype is not None else set()):
        return model, dtype
    if narrow == torch.float32 or dtypes == {narrow}:
        return model, None
    return _copy(model, narrow), None


def _dtype_of(model: PreTrainedModel, precision: str) -> torch.dtype | None:
    """The dtype that `inference_backbone` computes in; None: that of the weights."""
    if precision != "auto":
        return getattr(torch, precision)
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        return None
    faster, seconds = choose_precision("cpu", max(model.config.hidden_size, MIN_TIMED_WIDTH))
    if seconds:
        timed = ", ".join(f"{name} {1e3 * second:.2f} ms" for name, second in seconds.items())
        logger.info_once(f"precision: {faster} (one product of the model's width: {timed})")
    return getattr(torch, faster)


def _copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    # What deepcopy is told to have copied already, it takes as it is.
    return copy.deepcopy(model, {id(parameter): _cast(parameter, dtype) for parameter in model.parameters()})


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if parameter.dtype == dtype:
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def num_workers(model: PreTrainedModel, num_rows: int) -> int:
    """Batches to be run at a time: one, unless the model is on the CPU."""
    return min(torch.get_num_threads(), num_rows) if model.device.type == "cpu" else 1


def rows_per_pass(model: PreTrainedModel, row_length: int, batch_size: int) -> int:
    """Rows that a batch holds at most: `batch_size`, or of a model on the CPU what stays in the cache."""
    if model.device.type != "cpu":
        return batch_size
    widest = model.dtype.itemsize * model.config.intermediate_size * max(row_length, 1)
    return max(1, min(batch_size, CACHED_BYTES // widest))


def batch_sizes(num_rows: int, batch_size: int, workers: int) -> list[int]:
    """Sizes of batches of at most `batch_size` rows, in order; as many and as large for every one of the workers."""
    if workers <= 1:
        return [min(batch_size, num_rows - first) for first in range(0, num_rows, batch_size)]
    rounds = -(-num_rows // (workers * batch_size))
    count = min(rounds * workers, num_rows)
    return [num_rows // count + (index < num_rows % count) for index in range(count)]


def run_in_order(
    function: Callable[[Any], Any], batches: Iterable[Any], workers: int, threads: int | None = None
) -> Iterator[Any]:
    """`map(function, batches)`, up to `workers` calls at a time; at most one more batch is held than are worked on.

    Each has `threads` of torch's; None: its share of them.
    """
    threads = max(1, torch.get_num_threads() // max(workers, 1)) if threads is None else threads
    if workers <= 1 and threads == torch.get_num_threads():
        yield from map(function, batches)
        return
    with _pool(workers, threads) as pool:
        waiting: deque[Future] = deque()
        for batch in batches:
            waiting.append(pool.submit(function, batch))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _pool(workers: int, threads: int) -> Iterator[ThreadPoolExecutor]:
    """Workers with so many of torch's threads each."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "windows", initializer=torch.set_num_threads, initargs=(threads,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # each thread has its own number, but new ones take over the last that was set
