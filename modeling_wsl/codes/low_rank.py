"""Weighted low-rank approximation of a piece of a layer: which width, which ranks, and factors without redundancy."""

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import NormalDist

import torch


# Row sizes that are tried for every piece: the common products of trailing sizes, the small numbers, and multiples of
# eight and nine. Which one fits is found out from the weights, so that a code needs nothing but tokens.
WIDTHS = sorted(
    {*range(4, 65), *range(64, 1217, 8), *range(72, 577, 9), *range(75, 401, 25), 147, 588, 784}
    | {1280, 1440, 1536, 1600, 1728, 1792, 1920, 2048, 2304, 2560, 3072, 3456, 3840, 4096, 4608}
)
MAX_WIDTH = max(WIDTHS)
MIN_WIDTH, MAX_MULTIPLE = 2, 32  # among the divisors and the multiples of a known row size
CANDIDATES = 8  # widths whose spectrum is computed, of all whose Gram matrix is
MAX_COMBINATION = 1.5  # pivots are exchanged until no row takes more than this of one of them
MAX_EXCHANGES = 100
STANDARD_NORMAL = NormalDist()


@dataclass(frozen=True)
class Piece:
    """Consecutive weights of one layer, and what an error in each of them counts.

    Args:
        values: float64 [n].
        weights: float64 [n], positive; the error of a weight is multiplied by it.
        offset: index of the first weight within its layer.
        row_size: size of a row of the layer's largest tensor; 0 where that is not known.
    """

    values: torch.Tensor
    weights: torch.Tensor
    offset: int
    row_size: int = 0

    @property
    def widths(self) -> Sequence[int]:
        """The row sizes to try, ascending.

        Of a known row size the divisors and the multiples. Else `WIDTHS`, and what a whole layer's length tells: its
        divisors, and one less than those, the rows of a weight that a bias follows.
        """
        if size := self.row_size:
            sizes = {*divisors(size), *range(2 * size, MAX_MULTIPLE * size + 1, size)}
        else:
            of_length = divisors(len(self))
            sizes = {*WIDTHS, *of_length, *(width - 1 for width in of_length)}
        return sorted(width for width in sizes if MIN_WIDTH <= width <= max(size, MAX_WIDTH))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def energy(self) -> float:
        """The weighted squared error of giving back zeros."""
        return float((self.values * self.weights).square().sum())


def divisors(number: int) -> set[int]:
    """All of them, of a positive number."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return {*small, *(number // divisor for divisor in small)}


@dataclass(frozen=True)
class Layout:
    """A piece as a matrix: `first` weights, then `rows` whole rows of `width`, then what is left.

    Rows begin where rows of the layer do, at multiples of the width, wherever the piece begins.
    """

    length: int
    width: int
    first: int
    rows: int

    @classmethod
    def of(cls, length: int, offset: int, width: int) -> "Layout":
        first = min(-offset % width, length)
        return cls(length, width, first, (length - first) // width)

    @property
    def short(self) -> int:
        """The shorter side of the matrix, its largest rank."""
        return min(self.rows, self.width)

    @property
    def long(self) -> int:
        return max(self.rows, self.width)

    @property
    def last(self) -> int:
        """Where the whole rows end."""
        return self.first + self.rows * self.width

    @property
    def outside(self) -> int:
        """Weights outside of whole rows."""
        return self.length - self.rows * self.width

    def matrix(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.first : self.last].view(self.rows, self.width)

    def gram(self, matrix: torch.Tensor) -> torch.Tensor:
        """[short, short]."""
        return matrix @ matrix.T if self.rows <= self.width else matrix.T @ matrix

    def numbers(self, rank: torch.Tensor | int) -> torch.Tensor | int:
        """The numbers of a rank: degrees of freedom of such a matrix, an index a pivot, and the weights outside."""
        return rank * (self.rows + self.width - rank) + rank + self.outside

    def largest_rank(self, budget: int) -> int:
        """The largest rank below full rank that takes at most `budget` numbers; -1 where not even rank 0 does."""
        room, sides = budget - self.outside, self.rows + self.width + 1
        if room < 0:
            return -1
        # The first root of rank (sides - rank) = room; the square root is rounded up, and so the rank down.
        square = sides**2 - 4 * room
        if square < 0:
            return self.short - 1
        root = math.isqrt(square)
        return min((sides - root - (root**2 < square)) // 2, self.short - 1)


@dataclass(frozen=True)
class Spectrum:
    """The best layout of a piece, with what each rank loses.

    Args:
        error: float64 [short], the weighted squared error with rank 0, 1, ..., short - 1.
        vectors: float64 [short, short], orthonormal columns; the last `rank` span the rows of the best approximation.
    """

    layout: Layout
    error: torch.Tensor
    vectors: torch.Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix of low rank [rows, width], or its transpose where it has more rows than columns: [short, long].

    `rank` of its rows are given as they are (the pivots), the others as combinations of those.

    Args:
        pivots: int64 [rank], ascending.
        rows: [rank, long].
        combinations: [short - rank, rank], for the other rows in their order.
    """

    pivots: torch.Tensor
    rows: torch.Tensor
    combinations: torch.Tensor

    def matrix(self, layout: Layout) -> torch.Tensor:
        """[rows, width]."""
        result = self.rows.new_empty(layout.short, layout.long)
        result[self.pivots] = self.rows
        result[others(self.pivots, layout.short)] = self.combinations @ self.rows
        return result.T if layout.rows > layout.width else result


def best_spectrum(piece: Piece, budget: int, widths: Sequence[int] | None = None) -> Spectrum | None:
    """The layout that loses least at `budget` numbers; None where no width gives two rows and fits.

    `widths` ascend; None: the piece's own.
    """
    best = best_layout(piece, budget, widths)
    return None if best is None else spectrum_of(piece, best)


def best_layout(piece: Piece, budget: int, widths: Sequence[int] | None = None) -> Layout | None:
    """See `best_spectrum`.

    Every width is judged by the first two moments of its spectrum, which need no eigenvalues: as if the logarithms of
    the squared singular values were normally distributed. The best `CANDIDATES` are then computed. In float32: this
    only chooses.
    """
    scaled = piece.values * piece.weights
    energy = float(scaled.square().sum())
    if energy == 0 or not math.isfinite(energy):
        return None
    scaled = (scaled / energy**0.5).float()
    energy_before = scaled.double().square().cumsum(0)  # of the weights up to and with each
    guesses: list[tuple[float, int, Layout, int, torch.Tensor]] = []  # the best ones, ascending
    length = len(scaled)
    for width in piece.widths if widths is None else widths:
        if 2 * width > length:
            break
        layout = Layout.of(length, piece.offset, width)
        rank = layout.largest_rank(budget) if layout.rows >= 2 else -1
        if rank < 0:
            continue
        trace = energy_before[layout.last - 1].item() - (energy_before[layout.first - 1].item() if layout.first else 0)
        if trace <= 0:
            continue
        gram, short = layout.gram(layout.matrix(scaled)), layout.short
        flat = gram.view(-1)
        spread = math.sqrt(math.log(max(flat.dot(flat).item() * short / trace**2, 1)))
        share = min(max(rank / short, 1e-6), 1 - 1e-6)
        guess = trace * STANDARD_NORMAL.cdf(-STANDARD_NORMAL.inv_cdf(share) - spread)
        if len(guesses) < CANDIDATES or guess < guesses[-1][0]:
            insort(guesses, (guess, width, layout, rank, gram), key=lambda entry: entry[:2])
            del guesses[CANDIDATES:]
    best, least = None, float("inf")
    for _, _, layout, rank, gram in guesses:
        try:
            lost = float(torch.linalg.eigvalsh(gram)[: layout.short - rank].clamp_min(0).sum())
        except torch.linalg.LinAlgError:  # did not converge
            continue
        if lost < least:
            best, least = layout, lost
    return best


def spectrum_of(piece: Piece, layout: Layout) -> Spectrum | None:
    """The loss of each rank under the weights of `weighted_matrix`; None in the rare case that no solver converges."""
    matrix, _, _ = weighted_matrix(piece, layout)
    try:
        energies, vectors = torch.linalg.eigh(layout.gram(matrix))  # ascending
    except torch.linalg.LinAlgError:
        try:
            vectors, singular, _ = torch.linalg.svd(short_first(matrix, layout), full_matrices=False)
        except torch.linalg.LinAlgError:
            return None
        energies, vectors = singular.square().flip(0), vectors.flip(1)
    return Spectrum(layout, energies.clamp_min(0).cumsum(0).flip(0), vectors)


def short_first(matrix: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The matrix [rows, width], or its transpose where it has more rows than columns: [short, long]."""
    return matrix.T if layout.rows > layout.width else matrix


def weighted_matrix(piece: Piece, layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matrix with rows and columns multiplied so that an error counts about what `piece.weights` say.

    Returns:
        float64 [rows, width], and the multipliers [rows, 1] and [1, width]. Weights that are no product of two such
        are approximated by one: low-rank approximation with other weights has no closed form.
    """
    weights = layout.matrix(piece.weights)
    of_rows = weights.square().mean(1, keepdim=True).sqrt()
    of_columns = (weights / of_rows).square().mean(0, keepdim=True).sqrt()
    return layout.matrix(piece.values) * of_rows * of_columns, of_rows, of_columns


def factorize(piece: Piece, spectrum: Spectrum, rank: int) -> Factors:
    """The best approximation of `rank` >= 1 under the weights of `weighted_matrix`, float64."""
    layout = spectrum.layout
    matrix, of_rows, of_columns = weighted_matrix(piece, layout)
    if layout.rows > layout.width:
        matrix, of_rows, of_columns = matrix.T, of_columns.T, of_rows.T
    basis = spectrum.vectors[:, -rank:]  # [short, rank]
    pivots = choose_pivots(basis)
    combinations = torch.linalg.solve(basis[pivots].T, basis.T).T  # [short, rank], the identity at the pivots
    rows = basis[pivots] @ (basis.T @ matrix)
    combinations = combinations * of_rows[pivots].T / of_rows
    return Factors(pivots, rows / of_rows[pivots] / of_columns, combinations[others(pivots, layout.short)])


def choose_pivots(basis: torch.Tensor) -> torch.Tensor:
    """Rows of an orthonormal basis [short, rank] that span it well, int64 [rank], ascending.

    Gaussian elimination with partial pivoting, then exchanges, each of which enlarges the volume that the pivots span,
    until no row is a combination of them with a coefficient above `MAX_COMBINATION`: what is stored stays of the size
    of the weights, and an error in a pivot is not magnified.
    """
    size, rank = basis.shape
    order = torch.arange(size).tolist()
    for at, other in enumerate((torch.linalg.lu_factor(basis).pivots - 1).tolist()):
        order[at], order[other] = order[other], order[at]
    pivots = torch.tensor(order[:rank])
    combinations = torch.linalg.solve(basis[pivots].T, basis.T).T
    for _ in range(MAX_EXCHANGES):
        row, pivot = divmod(int(combinations.abs().argmax()), rank)
        largest = combinations[row, pivot].clone()
        if abs(largest) <= MAX_COMBINATION:
            break
        change = combinations[row].clone()
        change[pivot] -= 1
        combinations -= torch.outer(combinations[:, pivot] / largest, change)
        pivots[pivot] = row
    return pivots.sort().values


def others(pivots: torch.Tensor, size: int) -> torch.Tensor:
    """bool [size], true for the rows that are no pivots."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[pivots] = False
    return mask


def allocate(pieces: Sequence[Piece], spectra: Sequence[Spectrum | None], budget: int) -> list[int | None]:
    """The rank of each piece, so that all pieces together lose least within `budget` numbers.

    A rank of None stands for the weights as they are, -1 for nothing at all.

    Greedy on the lower convex hull of every piece's error over its numbers: the best there is, up to the last step.
    What that step leaves is then spent off the hulls.
    """
    tables = [_choices(piece, spectrum) for piece, spectrum in zip(pieces, spectra, strict=True)]
    steps: list[tuple[float, int, tuple[int, float, int | None]]] = []
    for at, points in enumerate(tables):
        hull = lower_hull(points)
        steps += [((b[1] - a[1]) / (b[0] - a[0]), at, b) for a, b in zip(hull, hull[1:], strict=False)]
    chosen = [points[0] for points in tables]
    full = set()
    for _, at, point in sorted(steps, key=lambda step: step[:2]):  # slopes of a hull rise: its steps stay in order
        more = point[0] - chosen[at][0]
        if at in full or more > budget:
            full.add(at)
            continue
        budget -= more
        chosen[at] = point
    while True:
        # Of each piece the largest rank that fits; of these the one that gains most.
        last = [
            points[bisect_right(points, now[0] + budget, key=itemgetter(0)) - 1]
            for points, now in zip(tables, chosen, strict=True)
        ]
        gains = [now[1] - point[1] for now, point in zip(chosen, last, strict=True)]
        at = max(range(len(gains)), key=gains.__getitem__, default=None)
        if at is None or gains[at] <= 0:
            return [rank for _, _, rank in chosen]
        budget -= last[at][0] - chosen[at][0]
        chosen[at] = last[at]


def _choices(piece: Piece, spectrum: Spectrum | None) -> list[tuple[int, float, int | None]]:
    """(numbers, error, rank) of all that a piece may be given, numbers ascending."""
    length = len(piece)
    points: list[tuple[int, float, int | None]] = [(0, piece.energy, -1)]
    if spectrum is not None:
        layout = spectrum.layout
        numbers = layout.numbers(torch.arange(layout.short)).tolist()
        points += [
            (count, error, rank)
            for rank, (count, error) in enumerate(zip(numbers, spectrum.error.tolist(), strict=True))
            if rank > 0 and count < length
        ]
    points.append((length, 0.0, None))
    return points


def lower_hull(points: Sequence[tuple[int, float, int | None]]) -> list[tuple[int, float, int | None]]:
    """Those of the points (numbers, error, ...), ascending, that lie on the lower convex hull."""
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(left: tuple, middle: tuple, right: tuple) -> bool:
    """Whether the middle one of three points lies on or above the line between the others."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (middle[0] - left[0])
