"""Whole models into the matrix code, window by window.

The numbers of a window belong together, so windows are cut here without context and encoded as they are; the context
that a halo gives matters to the network alone, which corrects tokens after the code is undone.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


def cut_windows(
    chunks: Iterable[Mapping[str, Tensor]], num_tokens: int, window_size: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Cuts a sequence that arrives in pieces into windows without a halo, the last one as long as what is left.

    Args:
        chunks: see `sampling.encode_stream`. Where a piece has the `manifest` and `token_start` that
            `WSLFeatureExtractor.stream` gives, windows have `row_sizes` too.
        num_tokens: of all pieces together.
        window_size: tokens per window.

    Yields:
        (index of the first token, `tokens`, `token_mask`, `positions` and `row_sizes`, each `[n, ...]`), in order.

    Raises:
        ValueError: the pieces hold more or fewer than `num_tokens` tokens.
    """
    held: dict[str, Tensor] = {}
    start = stop = 0
    for chunk in chunks:
        fields = {name: chunk[name] for name in ("tokens", "token_mask", "positions") if chunk.get(name) is not None}
        count = len(fields["tokens"])
        if chunk.get("manifest") is not None:
            first = int(chunk["positions"][0, 0])
            fields["row_sizes"] = chunk["manifest"].row_sizes(first, first + count)
        stop += count
        held = {name: torch.cat([held[name], value]) if held else value for name, value in fields.items()}
        while stop - start >= window_size or (stop == num_tokens and start < stop):
            length = min(window_size, stop - start)
            yield start, {name: value[:length] for name, value in held.items()}
            held = {name: value[length:] for name, value in held.items()}
            start += length
    if stop != num_tokens:
        raise ValueError(
            f"The pieces hold {stop} tokens, num_tokens says {num_tokens}. Pass the number of tokens of the whole "
            "sequence (manifest.num_tokens)."
        )


def encode_windows(
    model: PreTrainedModel, chunks: Iterable[Mapping[str, Tensor]], num_tokens: int, window_size: int
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first token, latents `[n, latent_size]` float32 on the CPU) of one window after the other."""
    for start, fields in cut_windows(chunks, num_tokens, window_size):
        yield start, model.encode(**{name: value[None] for name, value in fields.items()})[0].float().cpu()
