"""Attention in bfloat16 on a CPU where no gradients are asked for: two matmuls and an exponential, a window at a time.

The scores between the two matmuls of one window stay in the cache, those of a batch do not. Without gradients no
softmax is needed: the exponentials go into the second matmul as they are, and its result is divided by their sums.
"""

import math
import threading

import torch
from torch import Tensor


MAX_SCORES = 1 << 21  # at once, in entries: 4 MB
# Sums of exponentials between these are far from the ends of bfloat16, even times any value that is attended to.
MIN_SUM, MAX_SUM = 2.0**-100, 2.0**100

# New memory for the scores of every layer would cost as much as the exponential: the system clears its pages.
_scratch = threading.local()


def attend_without_gradients(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int] | None, scaling: float
) -> Tensor | None:
    """softmax(scaling x query key^T) value, both ways, without taking the maximum off the scores.

    Args:
        query, key, value: bfloat16 `[batch, heads, tokens, head_dim]`, of any strides, on the CPU.
        lengths: keys of each window that are attended to, its first ones; None for all. A window with none gives 0.

    Returns:
        bfloat16 `[batch, tokens, heads, head_dim]`, contiguous; None where exponentials leave the range of their type
        (scores beyond 69 in all of a row, which no sensible weights give), or are no numbers.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, heads, tokens, head_dim = query.shape
    num_heads = max(1, min(heads, MAX_SCORES // tokens**2))  # at once
    num_queries = max(1, min(tokens, MAX_SCORES // tokens))
    scratch = _scores(num_heads * num_queries * tokens)
    sums, attended = query.new_empty(batch, heads, tokens, 1), torch.empty_like(query)
    for row in range(batch):
        keys = tokens if lengths is None else lengths[row]
        if keys == 0:
            sums[row], attended[row] = 1, 0
            continue
        for head in range(0, heads, num_heads):
            those = slice(head, head + num_heads)
            transposed, values = key[row, those, :keys].mT, value[row, those, :keys]
            for first in range(0, tokens, num_queries):
                part = row, those, slice(first, first + num_queries)
                queries = query[part]
                shape = *queries.shape[:2], keys
                scores = scratch[: math.prod(shape)].view(shape)
                torch.baddbmm(scores, queries, transposed, beta=0, alpha=scaling * math.log2(math.e), out=scores)
                torch.sum(scores.exp2_(), -1, keepdim=True, out=sums[part])
                torch.bmm(scores, values, out=attended[part])
    lowest, highest = sums.aminmax()
    if not (lowest > MIN_SUM and highest < MAX_SUM):  # a NaN neither
        return None
    result = query.new_empty(batch, tokens, heads, head_dim)
    torch.div(attended, sums, out=result.transpose(1, 2))
    return result


def _scores(size: int) -> Tensor:
    """Memory for scores, the same one for every call of a thread."""
    held = getattr(_scratch, "scores", None)
    if held is None or len(held) < size:
        with torch.inference_mode(False):  # a tensor made within it could not be written to outside of it
            held = _scratch.scores = torch.empty(size, dtype=torch.bfloat16)
    return held
