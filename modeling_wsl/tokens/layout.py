"""Moves weights into tokens and back, block by block, at the speed of memory: no loop over tokens or rows.

Both tokenizations are one case: a block is a matrix `[rows, row_entries]` whose rows are cut into `row_tokens` tokens
(`manifest.Block`); a dense layer is a single row. Everything here works on any range of tokens, so that streaming a
model needs the memory of one window.
"""

from collections.abc import Callable

import torch

from .manifest import Block, TensorSpec


# Reads entries [start, stop) of a stored tensor in row-major order, possibly as a view on a memory-mapped file.
EntryReader = Callable[[TensorSpec, int, int], torch.Tensor]


def read_tokens(out: torch.Tensor, block: Block, start: int, stop: int, read: EntryReader) -> None:
    """Fills `out` with tokens `[start, stop)` of a block, padding included; reads only the tensors that they hold.

    Args:
        out: contiguous `[stop - start, d_t]`; overwritten.
        block: where the tokens come from.
        start, stop: token indices within the block.
        read: see `EntryReader`.
    """
    token_size = out.shape[1]
    for first, last, row, rows, columns in _pieces(block, start, stop, token_size):
        piece = out[first - start : last - start].view(rows, -1)  # [rows, columns of these tokens]
        end = min(columns + piece.shape[1], block.row_entries)
        piece[:, end - columns :] = 0
        left = 0  # first column of the matrix at hand
        for spec in block.tensors:
            width = spec.numel // block.rows
            a, b = max(columns, left), min(end, left + width)
            if a < b:
                if rows == 1:
                    values = read(spec, row * width + a - left, row * width + b - left)[None]
                else:
                    values = read(spec, row * width, (row + rows) * width).view(rows, width)[:, a - left : b - left]
                piece[:, a - columns : b - columns].copy_(values)
            left += width


def write_tokens(tokens: torch.Tensor, block: Block) -> dict[str, torch.Tensor]:
    """The tensors of a block, copied from all its tokens `[rows * row_tokens, d_t]`, in their shapes and dtypes."""
    matrix = tokens.reshape(block.rows, -1)
    tensors, left = {}, 0
    for spec in block.tensors:
        width = spec.numel // block.rows
        values = torch.empty(spec.shape, dtype=spec.torch_dtype, device=tokens.device)
        values.view(block.rows, width).copy_(matrix[:, left : left + width])
        tensors[spec.name] = values
        left += width
    return tensors


def _pieces(block: Block, start: int, stop: int, token_size: int) -> list[tuple[int, int, int, int, int]]:
    """Cuts a token range into at most three rectangles: the rest of a row, whole rows, the beginning of a row.

    Returns (first token, last token, first row, number of rows, first column) of each.
    """
    if block.rows == 1:
        return [(start, stop, 0, 1, start * token_size)]
    pieces = []
    while start < stop:
        row, within = divmod(start, block.row_tokens)
        if within or stop - start < block.row_tokens:
            last, rows = min(stop, (row + 1) * block.row_tokens), 1
        else:
            rows = (stop - start) // block.row_tokens
            last = start + rows * block.row_tokens
        pieces.append((start, last, row, rows, within * token_size))
        start = last
    return pieces
