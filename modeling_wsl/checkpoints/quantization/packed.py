"""A weight that is stored as several tensors, and the reader that makes it again, some rows at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from ...tokens.manifest import TensorSpec
from ..errors import QuantizedError, shorten


PIECE_ENTRIES = 1 << 20  # of a weight that are made at once
LOAD_IT = "Load it with the library that made it and save what its dequantize() gives, or pass the original model"
DAMAGED = "The file is damaged, or of a version that is not known here; pass the original model"


@dataclass(frozen=True)
class Packed:
    """A weight that is stored as something else.

    Attributes:
        spec: name, original shape and resulting dtype of the weight.
        parts: the stored tensors that it is made of.
        stored_as: the scheme in a few words: "gptq, 4 bits, groups of 128".
        rows: (start, stop) -> the weight's rows `[stop - start, *shape[1:]]`, on the first dimension; where `row` is
            given, rows of so many entries, whatever the shape.
    """

    spec: TensorSpec
    parts: tuple[str, ...]
    stored_as: str
    rows: Callable[[int, int], torch.Tensor]
    row: int | None = None


@dataclass(frozen=True)
class Stored:
    """The tensors of the file, as recognizers see them.

    Attributes:
        source: for messages.
        specs: by name.
        read: gives a tensor.
    """

    source: str
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], torch.Tensor]

    def first(self, *names: str) -> str | None:
        """The first of the names that the file has."""
        return next((name for name in names if name in self.specs), None)

    def small(self, name: str, limit: int = 1 << 16) -> torch.Tensor:
        """A tensor that says how to read others: read when the file is opened, so it must be small."""
        if self.specs[name].numel > limit:
            raise self.misfit(name, f"of shape {list(self.specs[name].shape)} is too large to describe another")
        return self.read(name)

    def misfit(self, name: str, what: str) -> QuantizedError:
        """The error about stored tensors that do not fit each other."""
        return QuantizedError(self.source, f"its weights are quantized, and tensor {shorten(name)} {what}", DAMAGED)


class PackedReader:
    """Packed weights by name; of all of them, the piece made last is kept."""

    def __init__(self, weights: Iterable[Packed]):
        self.weights = {weight.spec.name: weight for weight in weights}
        self._last: tuple[str, int, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        """The whole weight."""
        spec = self.weights[name].spec
        return self.entries(name, 0, spec.numel).view(spec.shape)

    def entries(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries `[start, stop)` of the weight in row-major order."""
        spec = self.weights[name].spec
        row_size = max(1, self.weights[name].row or prod(spec.shape[1:]))
        num_rows = spec.numel // row_size
        rows = max(1, PIECE_ENTRIES // row_size)  # of a piece
        size = rows * row_size
        out = None
        while True:
            index = start // size
            piece = self._piece(name, index, index * rows, min((index + 1) * rows, num_rows))
            end = min(stop, (index + 1) * size)
            part = piece[start - index * size : end - index * size]
            if out is None and end >= stop:
                return part
            if out is None:
                out = torch.empty(stop - start, dtype=spec.torch_dtype)
                first = start
            out[start - first : end - first] = part
            if end >= stop:
                return out
            start = end

    def _piece(self, name: str, index: int, start: int, stop: int) -> torch.Tensor:
        if self._last is None or self._last[:2] != (name, index):
            self._last = None  # its memory is free before the next is made
            weight = self.weights[name]
            rows = weight.rows(start, stop).to(weight.spec.torch_dtype).reshape(-1)
            self._last = (name, index, rows)
        return self._last[2]


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unsigned numbers of a few bits that lie one after the other, the lowest bits first.

    Args:
        words: integers `[rows, words]`, contiguous.
        bits: of a number, 1 to 8.
        count: how many numbers a row has.

    Returns:
        uint8 `[rows, count]`.
    """
    data = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((data[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[:, :count]
    padding = -data.shape[-1] % bits  # eight numbers fill as many bytes as a number has bits
    groups = torch.nn.functional.pad(data, (0, padding)).unflatten(-1, (-1, bits)).long()
    joined = (groups << torch.arange(0, 8 * bits, 8)).sum(-1)
    numbers = (joined[..., None] >> torch.arange(0, 8 * bits, bits)) & ((1 << bits) - 1)
    return numbers.to(torch.uint8).flatten(-2)[:, :count]


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """The float32 scales that unsigned bytes, or float8_e8m0fnu, stand for: 2 ** (byte - 127)."""
    return torch.exp2(exponents.view(torch.uint8).float() - 127)


def widened(scale: torch.Tensor) -> torch.Tensor:
    """Scales of any dtype as float32."""
    return powers_of_two(scale) if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else scale.float()
