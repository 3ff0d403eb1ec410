"""Statistics of one tensor: moments, histogram, zeros, spectrum. It is read in pieces, however large it is."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from modeling_wsl.checkpoints.checkpoint import pieces


CHUNK_ENTRIES = 1 << 21  # widened to float64 at once: 16 MB
# Over this many entries the spectrum is that of evenly spaced rows, and the histogram that of evenly spaced entries.
MAX_SPECTRUM_ENTRIES = 1 << 25
MAX_HISTOGRAM_ENTRIES = 1 << 22
BINS = 41
CENTRAL_STDS = 6  # entries farther from the mean are counted as outside of the histogram
DIRECT_SVD_SIDE = 64  # for narrower matrices all singular values cost less than a search for the largest


@dataclass(frozen=True)
class Histogram:
    """Counts in `BINS` equal bins from `low` to `high`, over about the mean +- 6 standard deviations.

    Attributes:
        counts: of the entries that were looked at; `outside` of them lie below `low` or above `high`.
        step: 1 where all entries were looked at, k where each k-th was.
    """

    low: float
    high: float
    counts: list[int]
    outside: int
    step: int


@dataclass(frozen=True)
class Spectrum:
    """Of a tensor seen as a matrix `[outputs, rest]`.

    Attributes:
        spectral_norm: largest singular value.
        stable_rank: squared Frobenius norm over squared spectral norm: between 1 and the smaller side.
        smaller_side: of the matrix.
        sampled_rows: None where all rows were looked at; otherwise how many, evenly spaced. The spectral norm is then
            a lower bound, and the stable rank that of these rows.
    """

    spectral_norm: float
    stable_rank: float
    smaller_side: int
    sampled_rows: int | None


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics over the finite entries of one tensor; None where there is none to tell.

    Attributes:
        nan, infinite: entries that are not finite.
        std: population standard deviation.
        kurtosis: fourth central moment over squared variance; 3 for a normal distribution.
        sparsity: share of the entries that are exactly 0.
        norm: Euclidean.
        dead_outputs: output rows that are all zero, of tensors of two dimensions and more.
        outputs: how many output rows there are.
    """

    nan: int
    infinite: int
    mean: float | None
    std: float | None
    minimum: float | None
    maximum: float | None
    kurtosis: float | None
    sparsity: float
    norm: float | None
    dead_outputs: int | None
    outputs: int | None
    spectrum: Spectrum | None
    histogram: Histogram | None


@dataclass(frozen=True)
class TensorReport:
    """One tokenized tensor; `kind` is one of `tensor_kinds.KINDS`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    entries: int
    statistics: TensorStatistics


def tensor_statistics(tensor: Tensor, output_last: bool = False) -> TensorStatistics:
    """Looks at a tensor in pieces; moments are exact and computed in float64.

    Args:
        tensor: real, of any shape and dtype; may be a view on a mapped file.
        output_last: the last dimension counts outputs (Keras' `kernel`), not the first.
    """
    count = nan = infinite = zeros = 0
    total, low, high = 0.0, math.inf, -math.inf
    for finite, missing, endless in _finite_pieces(tensor):
        nan, infinite = nan + missing, infinite + endless
        if len(finite):
            count, total = count + len(finite), total + float(finite.sum())
            zeros += len(finite) - int(finite.count_nonzero())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if not count:
        return TensorStatistics(nan, infinite, None, None, None, None, None, 0.0, None, None, None, None, None)
    mean = total / count if low < high else low
    std, kurtosis = _central_moments(tensor, mean, max(high - mean, mean - low), count)
    dead, outputs, spectrum = None, None, None
    if tensor.dim() >= 2 and min(tensor.shape) > 0:
        matrix = tensor.reshape(-1, tensor.shape[-1]) if output_last else tensor.reshape(len(tensor), -1)
        outputs = tensor.shape[-1 if output_last else 0]
        dead = count_zero_outputs(matrix.T if output_last else matrix) if zeros * outputs >= count else 0
        if not nan + infinite:
            spectrum = _spectrum(matrix, max(-low, high))
    return TensorStatistics(
        nan=nan,
        infinite=infinite,
        mean=_finite(mean),
        std=_finite(std),
        minimum=low,
        maximum=high,
        kurtosis=_finite(kurtosis),
        sparsity=zeros / count,
        norm=_finite(math.hypot(std, mean) * math.sqrt(count)),
        dead_outputs=dead,
        outputs=outputs,
        spectrum=spectrum,
        histogram=_histogram(tensor, mean, std, low, high),
    )


def _finite_pieces(tensor: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Consecutive finite entries, float64 `[n]`, and how many NaN and infinite ones lay between them."""
    for piece in pieces(tensor, CHUNK_ENTRIES * tensor.element_size()):
        wide = piece.double()
        finite = wide.isfinite()
        if finite.all():
            yield wide, 0, 0
        else:
            missing = int(wide.isnan().sum())
            yield wide[finite], missing, len(wide) - int(finite.sum()) - missing


def _central_moments(tensor: Tensor, mean: float, farthest: float, count: int) -> tuple[float, float | None]:
    """Standard deviation and kurtosis; deviations are divided by the largest of them, so that no power overflows."""
    if not 0 < farthest < math.inf:
        return 0.0, None
    second = fourth = 0.0
    for finite, *_ in _finite_pieces(tensor):
        squares = ((finite - mean) / farthest).square()
        second, fourth = second + float(squares.sum()), fourth + float(squares.square().sum())
    variance = second / count
    return farthest * math.sqrt(variance), fourth / count / variance**2


def count_zero_outputs(matrix: Tensor) -> int:
    """The number of rows of `[outputs, rest]` that are all zero."""
    return sum(int((part.double() == 0).all(1).sum()) for part in _row_pieces(matrix))


def _spectrum(matrix: Tensor, scale: float) -> Spectrum | None:
    """None for vectors, which have a norm alone, and where all is zero; `scale` is the largest entry's size."""
    rows, columns = matrix.shape
    if min(rows, columns) < 2 or scale == 0:
        return None
    step = -(-matrix.numel() // MAX_SPECTRUM_ENTRIES)
    matrix = matrix[::step]
    unit = torch.empty(matrix.shape)  # float32, of entries up to 1: no square overflows
    squares = 0.0
    for out, part in zip(_row_pieces(unit), _row_pieces(matrix), strict=True):
        out.copy_(part.double() / scale)
        squares += float(out.double().square().sum())
    if squares == 0:
        return None
    if min(matrix.shape) <= DIRECT_SVD_SIDE:
        largest = float(np.linalg.norm(unit.numpy(), 2))
    else:
        start = np.random.default_rng(0).standard_normal(min(unit.shape)).astype(np.float32)
        largest = float(svds(unit.numpy(), k=1, tol=1e-3, v0=start, return_singular_vectors=False)[0])
    sampled = len(matrix) if step > 1 else None
    return Spectrum(scale * largest, squares / largest**2, min(rows, columns), sampled)


def _row_pieces(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(max(1, CHUNK_ENTRIES // max(1, matrix.shape[1])))


def _histogram(tensor: Tensor, mean: float, std: float, low: float, high: float) -> Histogram | None:
    """None for constant tensors."""
    low, high = max(low, mean - CENTRAL_STDS * std), min(high, mean + CENTRAL_STDS * std)
    if not (std > 0 and 0 < high - low < math.inf):
        return None
    step = -(-tensor.numel() // MAX_HISTOGRAM_ENTRIES)
    values = tensor.reshape(-1)[::step].double()
    values = values[values.isfinite()]
    counts = torch.histc(values, BINS, low, high).long().tolist()
    return Histogram(low, high, counts, len(values) - sum(counts), step)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
