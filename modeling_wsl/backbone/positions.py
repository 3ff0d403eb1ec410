"""Positions [n, l, k] of a token as vectors: sinusoidal (paper, section 3.3) or learned (SANE)."""

import torch
from torch import nn


MAX_WAVELENGTH = 10000.0
DIGIT_BITS = 8
NUM_DIGITS = 4
POSITION_NAMES = ("n (index in the model)", "l (layer index)", "k (index in the layer)")


def default_positions(batch_size: int, num_tokens: int, device: torch.device | None = None) -> torch.Tensor:
    """Positions of windows that are the first tokens of one layer: n = k = 0, 1, 2, ... and l = 0.

    Returns:
        int64 [batch_size, num_tokens, 3].
    """
    index = torch.arange(num_tokens, device=device)
    return torch.stack([index, torch.zeros_like(index), index], dim=-1).expand(batch_size, -1, -1)


def check_positions(positions: torch.Tensor) -> None:
    """Raises ValueError unless `positions` is an integer tensor [batch, tokens, 3]."""
    if positions.ndim != 3 or positions.shape[-1] != 3:
        raise ValueError(
            f"positions must have shape [batch, tokens, 3], one [n, l, k] per token; got {list(positions.shape)}."
        )
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"positions must be integers (torch.int64), got {positions.dtype}.")


def sinusoidal_positions(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Three full-width sinusoidal encodings, of n, of l and of k, summed.

    Entry 2i is the sum over n, l, k of sin(p / 10000^(2i/dim)), entry 2i+1 the same of cosines, as in the paper's
    code.

    Models reach positions of several million, where float32 resolves an angle p * f to 0.3 rad only. Here p is split
    into base-256 digits, whose frequencies 256^j f are reduced modulo 2 pi in float64 first (a table of 4 x dim/2
    numbers), so that no product exceeds 255 pi and the angle stays within a few 1e-4 rad for p below 2^32, although
    all that is done per token is float32. Nothing is stored in the model: a table in a buffer would be lost by loading
    through the meta device and rounded by `model.to(torch.bfloat16)`.

    Args:
        positions: integers [batch, tokens, 3].
        dim: even width.

    Returns:
        float32 [batch, tokens, dim].
    """
    # Devices without float64 get the table from the CPU.
    table_device = torch.device("cpu") if positions.device.type == "mps" else positions.device
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=table_device) / dim  # [dim/2]
    frequencies = MAX_WAVELENGTH**-exponents
    scales = 2.0 ** (DIGIT_BITS * torch.arange(NUM_DIGITS, dtype=torch.float64, device=table_device))  # [digits]
    angles_per_digit = scales[:, None] * frequencies  # [digits, dim/2]
    # Into [-pi, pi): the smaller the factor, the smaller the rounding of its product with the digit.
    angles_per_digit = torch.remainder(angles_per_digit + torch.pi, 2 * torch.pi) - torch.pi
    angles_per_digit = angles_per_digit.to(dtype=torch.float32, device=positions.device)

    sines = cosines = None
    for coordinate in positions.to(torch.int64).unbind(-1):  # each [batch, tokens]
        angle = None
        for digit in range(_digits_of(coordinate)):
            value = coordinate >> (DIGIT_BITS * digit)
            if digit < NUM_DIGITS - 1:  # the last digit keeps all that is left
                value = value & (2**DIGIT_BITS - 1)
            # Products and sums, no matmul: that would be rounded to TF32 or bfloat16 where those are on.
            part = value[..., None].to(torch.float32) * angles_per_digit[digit]  # [batch, tokens, dim/2]
            angle = part if angle is None else angle.add_(part)
        sines = angle.sin() if sines is None else sines.add_(angle.sin())
        cosines = angle.cos() if cosines is None else cosines.add_(angle.cos())
    return torch.stack([sines, cosines], dim=-1).flatten(-2)  # sine and cosine alternate


def _digits_of(coordinate: torch.Tensor) -> int:
    """The number of base-256 digits that must be looked at: those above the highest position's are 0 and add nothing.

    All of them on other devices, which would have to be waited for, and in a graph, where values are not known.
    """
    known = coordinate.device.type == "cpu" and coordinate.numel() > 0 and not torch.compiler.is_compiling()
    if not known or int(coordinate.amin()) < 0:
        return NUM_DIGITS
    return min(max(1, -(-int(coordinate.amax()).bit_length() // DIGIT_BITS)), NUM_DIGITS)


class SinusoidalPositions(nn.Module):
    """`sinusoidal_positions` as a module without parameters or buffers: integers [batch, tokens, 3] -> [.., dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        check_positions(positions)
        return sinusoidal_positions(positions, self.dim)


class LearnedPositions(nn.Module):
    """SANE's learned positions: cat(table_n[n] + table_l[l], table_k[k]), each table of width dim / 2.

    Integers [batch, tokens, 3] -> [batch, tokens, dim]. A position beyond its table raises a ValueError that names the
    coordinate; a compiled graph leaves that to the device's own bounds check, since the values are not known there.
    """

    def __init__(self, dim: int, max_positions: list[int] | tuple[int, ...]):
        super().__init__()
        self.max_positions = tuple(max_positions)
        num_tokens, num_layers, num_in_layer = self.max_positions
        self.in_model = nn.Embedding(num_tokens, dim // 2)
        self.layer = nn.Embedding(num_layers, dim // 2)
        self.in_layer = nn.Embedding(num_in_layer, dim // 2)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        check_positions(positions)
        if not torch.compiler.is_compiling():
            self._check_range(positions)
        n, l, k = positions.unbind(-1)
        return torch.cat([self.in_model(n) + self.layer(l), self.in_layer(k)], dim=-1)

    def _check_range(self, positions: torch.Tensor) -> None:
        if positions.numel() == 0 or positions.device.type == "meta":
            return
        highest = positions.amax(dim=(0, 1)).tolist()
        lowest = positions.amin(dim=(0, 1)).tolist()
        for name, low, high, size in zip(POSITION_NAMES, lowest, highest, self.max_positions, strict=True):
            if low < 0 or high >= size:
                raise ValueError(
                    f"positions: {name} runs from {low} to {high}, but its learned table has {size} entries "
                    f"(max_positions={list(self.max_positions)}). Use a model with sinusoidal positions for larger "
                    "models, or train one with larger max_positions."
                )
