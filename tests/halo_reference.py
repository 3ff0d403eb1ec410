"""Haloed windows one at a time, by the definition: slow, obvious, and all that the fast path is compared with."""

import torch

from modeling_wsl.sampling import encode_stream


def haloed_row(start: int, num_tokens: int, window_size: int, halo: int) -> list[int]:
    """The tokens that the core window starting at `start` is processed with, shifted inwards at the ends."""
    row = list(range(start - halo, start + window_size + halo))
    while row[0] < 0:
        row = [token + 1 for token in row]
    while row[-1] >= num_tokens:
        row = [token - 1 for token in row]
    return [token for token in row if token >= 0]


def encode_haloed(model, tokens, token_mask, positions, window_size: int = 512, halo: int = 64, **options):
    """All latents of a sequence, by the fast path."""
    latents = torch.empty(len(tokens), model.config.latent_size)
    chunk = {"tokens": tokens, "token_mask": token_mask, "positions": positions}
    for start, part in encode_stream(model, [chunk], len(tokens), window_size=window_size, halo=halo, **options):
        latents[start : start + len(part)] = part
    return latents


def naive_haloed(method, sequences: dict[str, torch.Tensor], window_size: int, halo: int) -> torch.Tensor:
    """Applies `method` (encode or decode) to one window after the other; keeps each window's core, token by token."""
    num_tokens = len(sequences["positions"])
    results = []
    for start in range(0, num_tokens, window_size):
        row = haloed_row(start, num_tokens, window_size, halo)
        with torch.no_grad():
            output = method(**{name: value[row][None] for name, value in sequences.items()})[0]
        for token in range(start, min(start + window_size, num_tokens)):
            results.append(output[row.index(token)])
    return torch.stack(results)
