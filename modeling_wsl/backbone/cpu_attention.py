"""Attention in bfloat16 on a CPU that multiplies bfloat16, a few windows at a time.

Torch's own kernel there multiplies small blocks at a fifth of the matmul rate. Here the scores of a few windows, which
stay in the cache, go through batched matmuls at the full rate; like it, this keeps no scores for the backward pass.
A training step of `tiny` takes a tenth to a seventh less time with it, forward and backward.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface


# Scores held at a time, in entries: 3 MB in bfloat16. More leave the cache, fewer cost calls.
_SCORES = 1_500_000


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them torch's kernel is as good."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def serves(query: torch.Tensor) -> bool:
    """Whether `cpu_attention` is for inputs of this device and dtype; a graph to compile has kernels of its own."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
        and multiplies_bfloat16()
    )


def key_lengths(attention_mask: torch.Tensor) -> list[int] | None:
    """The number of keys of each window, from its mask bool [batch, 1, queries or 1, keys].

    None for a mask that is not so simple: of another shape or dtype, not the same for every query, or with padding
    that is not at the end alone.
    """
    if attention_mask.dtype != torch.bool or attention_mask.ndim != 4 or attention_mask.shape[1] != 1:
        return None
    of_first = attention_mask[:, :, :1]
    if not torch.equal(attention_mask, of_first.expand_as(attention_mask)):
        return None
    attended = of_first[:, 0, 0]
    lengths = attended.sum(-1)
    at_the_end = torch.arange(attended.shape[-1], device=attended.device) < lengths[:, None]
    return lengths.tolist() if torch.equal(attended, at_the_end) else None


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`cpu_attention` where it is the faster one, else transformers' `sdpa`; arguments and results as there.

    Without a backward pass it is not: encoding takes a seventh less time with torch's own.
    """
    if torch.is_grad_enabled() and serves(query):
        lengths = None if attention_mask is None else key_lengths(attention_mask)
        if attention_mask is None or lengths is not None:
            return cpu_attention(query, key, value, lengths, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


# The attention functions of transformers, with another one behind "sdpa" for the models that look it up here.
ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention


def cpu_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int] | None, scaling: float
) -> torch.Tensor:
    """softmax(scaling x query key^T) value, both ways.

    Scores are rounded to bfloat16 before the softmax, as in eager attention.

    Args:
        query, key, value: bfloat16 [batch, heads, tokens, head_dim], of any strides.
        lengths: keys of each window that are attended to, its first ones; None for all. A window with none gives 0.

    Returns:
        bfloat16 [batch, tokens, heads, head_dim], contiguous; differentiable once.
    """
    return _CPUAttention.apply(query, key, value, lengths, scaling)


def _chunks(batch: int, heads: int, tokens: int, lengths: list[int] | None) -> list[tuple[int, int, int]]:
    """Windows that are multiplied at once: (first, end, keys), of one length each."""
    most = max(1, _SCORES // (heads * tokens * tokens))
    chunks: list[tuple[int, int, int]] = []
    for row in range(batch):
        keys = tokens if lengths is None else lengths[row]
        if chunks and chunks[-1][2] == keys and row - chunks[-1][0] < most:
            chunks[-1] = (chunks[-1][0], row + 1, keys)
        else:
            chunks.append((row, row + 1, keys))
    return chunks


def _probabilities(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """[n, tokens, head_dim] and [n, keys, head_dim] -> attention [n, tokens, keys]."""
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=scaling)
    return torch._softmax(scores, -1, False, out=scores)


class _CPUAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, lengths, scaling):
        batch, heads, tokens, head_dim = query.shape
        ctx.chunks = _chunks(batch, heads, tokens, lengths)
        ctx.scaling = scaling
        ctx.save_for_backward(query, key, value)
        output = query.new_empty(batch, tokens, heads, head_dim)
        for first, end, keys in ctx.chunks:
            if keys == 0:
                output[first:end] = 0
                continue
            q, k, v = _of_chunk(query, first, end, tokens), *(_of_chunk(x, first, end, keys) for x in (key, value))
            attended = torch.bmm(_probabilities(q, k, scaling), v)
            output[first:end] = attended.view(end - first, heads, tokens, head_dim).transpose(1, 2)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        batch, heads, tokens, head_dim = query.shape
        # Laid out as the projections wrote what is differentiated: their backward pass then needs no copy.
        d_query, d_key, d_value = (
            query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) for _ in ("query", "key", "value")
        )
        gradient = gradient.to(query.dtype).transpose(1, 2)
        for first, end, keys in ctx.chunks:
            for all_keys in (d_key, d_value):
                all_keys[first:end, :, keys:] = 0
            if keys == 0:
                d_query[first:end] = 0
                continue
            q, g = (_of_chunk(x, first, end, tokens) for x in (query, gradient))
            k, v = (_of_chunk(x, first, end, keys) for x in (key, value))
            attention = _probabilities(q, k, ctx.scaling)
            parts = [(d_value, torch.bmm(attention.transpose(1, 2), g))]
            d_attention = torch.bmm(g, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_attention, attention, -1, query.dtype)
            parts.append((d_query, _scaled_bmm(d_scores, k, ctx.scaling)))
            parts.append((d_key, _scaled_bmm(d_scores.transpose(1, 2), q, ctx.scaling)))
            for target, part in parts:
                target[first:end, :, : part.shape[1]] = part.view(end - first, heads, -1, head_dim)
        return d_query, d_key, d_value, None, None


def _of_chunk(states: torch.Tensor, first: int, end: int, tokens: int) -> torch.Tensor:
    """[batch, heads, tokens, head_dim] -> [windows x heads, tokens, head_dim], contiguous: faster than strided."""
    return states[first:end, :, :tokens].reshape(-1, tokens, states.shape[-1]).contiguous()


def _scaled_bmm(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scaling)
