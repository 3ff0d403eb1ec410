"""Windows of a few layers, and what their matrix code is made of."""

import torch

from modeling_wsl.matrix_code import read_windows


SIZE = 24  # weights of a token


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rows, width, rank, seed=0):
    return randn(rows, rank, seed=seed) @ randn(rank, width, seed=seed + 1) / rank**0.5


def window_of(*layers, start=0):
    """Tokens, mask and positions of layers (flattened here); of the first one, from its token `start` on."""
    rows, masks, positions = [], [], []
    for index, layer in enumerate(layers):
        flat = layer.reshape(-1)
        count = -(-len(flat) // SIZE)
        padded = torch.zeros(count * SIZE)
        padded[: len(flat)] = flat
        places = torch.stack([torch.zeros(count), torch.full((count,), index), torch.arange(count)], dim=1).long()
        keep = slice(0 if index else start, None)
        rows.append(padded.view(count, SIZE)[keep])
        masks.append((torch.arange(count * SIZE) < len(flat)).view(count, SIZE)[keep])
        positions.append(places[keep])
    return torch.cat(rows), torch.cat(masks), torch.cat(positions)


def mixed_window(seed=0):
    """A matrix, its bias, a convolution, a vector, and one number."""
    scales = 10 ** (-3 * torch.rand(5, generator=torch.Generator().manual_seed(seed)))
    layers = [low_rank(30, 40, 6, seed) + 0.2 * randn(30, 40, seed=seed + 2), randn(30, seed=seed + 3)]
    layers += [low_rank(20, 45, 4, seed + 4) + 0.3 * randn(20, 45, seed=seed + 5), randn(20, seed=seed + 6), randn(1)]
    return window_of(*(scale * layer for scale, layer in zip(scales, layers, strict=True)))


def pieces_of(latents):
    return [piece for _, _, pieces in read_windows(latents, SIZE) for piece in pieces]


def relative_error(found, tokens, mask):
    return float(((found - tokens)[mask].square().sum() / tokens[mask].square().sum()).sqrt())


def structure_of(latents):
    """Bool like the latents: counts, lengths, offsets, widths, ranks, indices, and the zeros at the end."""
    flags = torch.ones(latents.shape, dtype=torch.bool)
    for start, stop, pieces in read_windows(latents, SIZE):
        flat = flags[start:stop].view(-1)
        for piece in pieces:
            rank = 0 if piece.factors is None else len(piece.factors.pivots)
            numbers = piece.layout.numbers(rank) if rank else len(piece.kept)
            flat[piece.first_number + rank : piece.first_number + numbers] = False
    return flags
