import itertools

import pytest
import torch

from modeling_wsl.codes.low_rank import (
    MAX_COMBINATION,
    WIDTHS,
    Layout,
    Piece,
    allocate,
    best_spectrum,
    choose_pivots,
    factorize,
    lower_hull,
    others,
    spectrum_of,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(rows, width, rank, seed=0):
    return randn(rows, rank, seed=seed) @ randn(rank, width, seed=seed + 1)


def piece_of(values, weights=None, offset=0):
    values = values.reshape(-1)
    return Piece(values, torch.ones_like(values) if weights is None else weights.reshape(-1), offset)


def weighted_svd_error(matrix, of_rows, of_columns, rank):
    """The least weighted squared error of that rank, where the weights are a product: a plain truncated SVD."""
    return float(torch.linalg.svdvals(matrix * of_rows * of_columns)[rank:].square().sum())


def weighted_error(piece, layout, factors):
    approximation = factors.matrix(layout)
    weights = layout.matrix(piece.weights)
    return float(((layout.matrix(piece.values) - approximation) * weights).square().sum())


@pytest.mark.parametrize("offset", [0, 1, 9, 10, 11, 25])
@pytest.mark.parametrize(("length", "width"), [(40, 10), (47, 10), (3, 10), (12, 1), (10, 10)])
def test_rows_of_a_layout_begin_where_rows_of_the_layer_do(length, width, offset):
    layout = Layout.of(length, offset, width)
    flat = torch.arange(offset, offset + length)  # an entry is its index in the layer
    matrix = layout.matrix(flat)
    assert matrix.shape == (layout.rows, width)
    assert (matrix[:, :1] % width == 0).all()
    outside = torch.cat([flat[: layout.first], flat[layout.last :]])
    assert torch.equal(torch.cat([outside, matrix.reshape(-1)]).sort().values, flat)
    assert layout.outside == len(outside) < 2 * width


@pytest.mark.parametrize(
    ("length", "offset", "width"), [(300, 0, 20), (300, 7, 20), (300, 3, 60), (48, 0, 24), (9, 0, 3)]
)
def test_the_largest_rank_is_the_largest_one_that_fits(length, offset, width):
    layout = Layout.of(length, offset, width)
    for budget in range(-2, length + 30):
        fitting = [rank for rank in range(layout.short) if layout.numbers(rank) <= budget]
        assert layout.largest_rank(budget) == max(fitting, default=-1)


def test_numbers_grow_with_the_rank():
    for rows, width in itertools.product((2, 3, 17, 50), repeat=2):
        layout = Layout(rows * width + 5, width, 2, rows)
        numbers = layout.numbers(torch.arange(layout.short + 1))
        assert (numbers.diff() > 0).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("size", "rank"), [(30, 1), (30, 7), (30, 29), (120, 60)])
def test_pivots_span_the_basis_and_no_row_takes_much_of_one(size, rank, seed):
    basis = torch.linalg.qr(randn(size, rank, seed=seed) * torch.logspace(0, -6, size, dtype=torch.float64)[:, None]).Q
    pivots = choose_pivots(basis)
    assert len(pivots) == len(pivots.unique()) == rank
    assert torch.equal(pivots, pivots.sort().values)
    combinations = torch.linalg.solve(basis[pivots].T, basis.T).T
    torch.testing.assert_close(combinations @ basis[pivots], basis)
    assert combinations.abs().max() <= MAX_COMBINATION * (1 + 1e-6)


def test_pivots_are_exchanged_where_elimination_chooses_badly():
    basis = torch.linalg.qr(randn(120, 60)).Q
    order = list(range(120))
    for at, other in enumerate((torch.linalg.lu_factor(basis).pivots - 1).tolist()):
        order[at], order[other] = order[other], order[at]
    eliminated = torch.linalg.solve(basis[order[:60]].T, basis.T)
    assert eliminated.abs().max() > MAX_COMBINATION
    assert torch.linalg.solve(basis[choose_pivots(basis)].T, basis.T).abs().max() <= MAX_COMBINATION * (1 + 1e-6)


def test_pivots_avoid_rows_of_zeros():
    basis = torch.zeros(20, 3, dtype=torch.float64)
    basis[[4, 11, 17]] = torch.linalg.qr(randn(3, 3)).Q
    assert choose_pivots(basis).tolist() == [4, 11, 17]


@pytest.mark.parametrize("rank", [1, 4, 11])
@pytest.mark.parametrize(("rows", "width"), [(12, 40), (40, 12), (12, 12)])
def test_a_matrix_of_low_rank_comes_back(rows, width, rank):
    matrix = low_rank(rows, width, rank)
    weights = randn(rows, 1, seed=5).exp() * randn(1, width, seed=6).exp()
    piece = piece_of(matrix, weights)
    layout = Layout.of(len(piece), 0, width)
    factors = factorize(piece, spectrum_of(piece, layout), rank)
    torch.testing.assert_close(factors.matrix(layout), matrix, rtol=1e-8, atol=1e-8)
    is_other = others(factors.pivots, layout.short)
    assert factors.combinations.shape == (is_other.sum(), rank)
    given = matrix if rows <= width else matrix.T
    torch.testing.assert_close(factors.rows, given[~is_other], rtol=1e-8, atol=1e-8)  # pivots are rows as they are


@pytest.mark.parametrize("rank", [1, 5, 15])
@pytest.mark.parametrize(("rows", "width"), [(16, 50), (50, 16)])
def test_white_noise_loses_what_the_best_weighted_svd_loses(rows, width, rank):
    matrix = randn(rows, width)
    of_rows, of_columns = randn(rows, 1, seed=5).exp(), randn(1, width, seed=6).exp()
    piece = piece_of(matrix, of_rows * of_columns)
    layout = Layout.of(len(piece), 0, width)
    spectrum = spectrum_of(piece, layout)
    expected = weighted_svd_error(matrix, of_rows, of_columns, rank)
    assert float(spectrum.error[rank]) == pytest.approx(expected, rel=1e-8)
    assert weighted_error(piece, layout, factorize(piece, spectrum, rank)) == pytest.approx(expected, rel=1e-8)
    assert len(spectrum.error) == layout.short
    assert float(spectrum.error[0]) == pytest.approx(piece.energy)


def test_weights_that_are_no_product_are_met_better_than_by_none():
    matrix, rank = randn(30, 60), 8
    weights = randn(30, 60, seed=1).mul(0.5).exp() * torch.logspace(-1, 1, 30, dtype=torch.float64)[:, None]
    layout = Layout.of(matrix.numel(), 0, 60)
    piece, plain = piece_of(matrix, weights), piece_of(matrix)
    weighted = weighted_error(piece, layout, factorize(piece, spectrum_of(piece, layout), rank))
    unweighted = weighted_error(piece, layout, factorize(plain, spectrum_of(plain, layout), rank))
    assert weighted < 0.7 * unweighted


@pytest.mark.parametrize(
    ("rows", "width", "offset", "extra"),
    [(40, 96, 0, 0), (96, 40, 0, 0), (40, 96, 50, 0), (64, 27, 13, 5), (30, 147, 0, 100), (500, 9, 4, 0)],
)
def test_the_width_of_a_structured_matrix_is_found(rows, width, offset, extra):
    rank = min(rows, width) // 4
    matrix = low_rank(rows + 1, width, rank) + 0.05 * randn(rows + 1, width, seed=9)
    flat = torch.cat([matrix.reshape(-1)[offset : rows * width], 0.1 * randn(extra, seed=3)])
    spectrum = best_spectrum(piece_of(flat, offset=offset), len(flat) // 2)
    # Some multiples of the true width describe the same rows.
    assert spectrum.layout.width % width == 0
    assert float(
        spectrum.error[min(spectrum.layout.largest_rank(len(flat) // 2), rank * spectrum.layout.width // width)]
    ) < (0.02 * float(flat.square().sum()))


def test_the_width_that_loses_least_is_chosen_among_the_candidates():
    matrix = low_rank(24, 36, 5) + 0.1 * randn(24, 36, seed=7)
    piece, budget, widths = piece_of(matrix), 400, [12, 18, 30, 36, 48]
    losses = {}
    for width in widths:
        layout = Layout.of(len(piece), 0, width)
        if (rank := layout.largest_rank(budget)) >= 0:
            losses[width] = float(torch.linalg.svdvals(layout.matrix(piece.values))[rank:].square().sum())
    assert best_spectrum(piece, budget, widths).layout.width == min(losses, key=losses.get) == 36


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_pieces_too_short_for_two_rows_have_no_spectrum(length):
    assert best_spectrum(piece_of(randn(length)), 1000) is None


def test_zeros_and_weights_that_overflow_have_no_spectrum():
    assert best_spectrum(piece_of(torch.zeros(500, dtype=torch.float64)), 250) is None
    assert best_spectrum(piece_of(randn(500) * 1e200), 250) is None


def test_no_width_fits_a_budget_below_the_weights_outside():
    assert best_spectrum(piece_of(randn(41)), 0, [10]) is None
    assert best_spectrum(piece_of(randn(41)), 1, [10]).layout.width == 10


def test_a_solver_that_does_not_converge_is_replaced(monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")

    piece = piece_of(low_rank(12, 40, 3) + 0.01 * randn(12, 40, seed=4))
    layout = Layout.of(len(piece), 0, 40)
    expected = spectrum_of(piece, layout)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = spectrum_of(piece, layout)
    torch.testing.assert_close(found.error, expected.error)
    torch.testing.assert_close(
        factorize(piece, found, 3).matrix(layout), factorize(piece, expected, 3).matrix(layout), rtol=1e-6, atol=1e-8
    )
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert best_spectrum(piece, 200) is None  # then the weights are kept, or nothing


def test_the_hull_of_points_is_below_all_of_them_and_convex():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        count = int(torch.randint(2, 12, (1,), generator=generator))
        numbers = torch.randint(0, 40, (count,), generator=generator).unique().tolist()
        errors = torch.rand(len(numbers), generator=generator).tolist()
        points = list(zip(numbers, errors, range(len(numbers)), strict=True))
        hull = lower_hull(points)
        assert hull[0] == points[0]
        assert hull[-1] == points[-1]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
        assert slopes == sorted(slopes)
        for number, error, _ in points:
            at = next(i for i, point in enumerate(hull) if point[0] >= number)
            if hull[at][0] == number:
                assert hull[at][1] <= error
            else:
                assert hull[at - 1][1] + slopes[at - 1] * (number - hull[at - 1][0]) <= error + 1e-12


def choices(piece, spectrum):
    """Every rank of a piece with its numbers and its error."""
    layout = spectrum.layout
    ranks = [(layout.numbers(rank), float(spectrum.error[rank]), rank) for rank in range(1, layout.short)]
    return [(0, piece.energy, -1), *(c for c in ranks if c[0] < len(piece)), (len(piece), 0.0, None)]


def cost(table, ranks):
    found = [next(c for c in options if c[2] == rank) for options, rank in zip(table, ranks, strict=True)]
    return sum(c[0] for c in found), sum(c[1] for c in found)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_as_good_as_all_tried_up_to_one_step(seed):
    scales = randn(3, seed=seed).mul(2).exp().tolist()
    pieces = [
        piece_of(scale * (low_rank(rows, width, 2, seed=10 * seed + i) + 0.3 * randn(rows, width, seed=seed + 50 + i)))
        for i, (scale, (rows, width)) in enumerate(zip(scales, [(6, 8), (5, 12), (9, 5)], strict=True))
    ]
    spectra = [best_spectrum(piece, len(piece), [width]) for piece, width in zip(pieces, (8, 12, 5), strict=True)]
    table = [choices(piece, spectrum) for piece, spectrum in zip(pieces, spectra, strict=True)]
    hulls = [lower_hull(options) for options in table]
    for budget in range(0, sum(map(len, pieces)) + 5, 7):
        ranks = allocate(pieces, spectra, budget)
        used, error = cost(table, ranks)
        assert used <= budget
        # Nothing that gains fits into what is left.
        for options, rank in zip(table, ranks, strict=True):
            now = next(c for c in options if c[2] == rank)
            assert not [c for c in options if c[0] <= now[0] + budget - used and c[1] < now[1]]
        combined = [[sum(c[k] for c in chosen) for k in (0, 1)] for chosen in itertools.product(*table)]
        least = min(loss for numbers, loss in combined if numbers <= budget)
        # What is missed is less than one step of a hull gains.
        step = max(a[1] - b[1] for hull in hulls for a, b in itertools.pairwise(hull))
        assert least <= error + 1e-9
        assert error <= least + step + 1e-9
    assert allocate(pieces, spectra, sum(map(len, pieces))) == [None] * 3
    assert allocate(pieces, spectra, 0) == [-1] * 3


def test_numbers_go_to_what_gains_by_them_and_what_is_left_makes_the_rest_exact():
    exact = low_rank(8, 10, 2)
    pieces = [piece_of(torch.zeros(50, dtype=torch.float64)), piece_of(randn(50)), piece_of(exact)]
    spectra = [None, None, best_spectrum(pieces[2], 80, [10])]
    spectra[2].error[2:] = 0
    assert allocate(pieces, spectra, 49) == [-1, -1, 2]
    assert allocate(pieces, spectra, 34 + 50) == [-1, None, 2]
    assert allocate(pieces, spectra, 34 + 50 + 50) == [None, None, 2]
    assert allocate(pieces, spectra, 180) == [None, None, None]


@pytest.mark.parametrize(
    ("row_size", "expected"),
    [(12, {2, 3, 4, 6, 12, 24, 36, 384}), (7, {7, 14, 224}), (1, {2, 3, 32}), (27 * 64, {27, 64, 576, 1728, 3456})],
)
def test_a_known_row_size_is_tried_with_its_divisors_and_multiples(row_size, expected):
    widths = Piece(randn(4), randn(4), 0, row_size).widths
    assert expected <= set(widths)
    assert list(widths) == sorted(set(widths))
    assert all(row_size % width == 0 or width % row_size == 0 for width in widths)
    assert len(widths) < 100


def test_the_widths_hold_the_row_sizes_of_common_layers():
    common = {3 * 7 * 7, 9 * 64, 9 * 512, 27, 768, 3072, 1024, 4096, 384, 192, 25, 16, 64 * 9 // 2, 48, 588}
    assert common <= set(WIDTHS)
    assert sorted(set(WIDTHS)) == list(WIDTHS)


def test_without_a_row_size_the_length_of_a_layer_tells_widths_too():
    # A weight [37, 23 x 29] and its bias: 37 (667 + 1) numbers.
    assert 23 * 29 not in WIDTHS
    widths = piece_of(randn(37 * (23 * 29 + 1))).widths
    assert {23 * 29, 37, *WIDTHS} <= set(widths)
    assert list(widths) == sorted(set(widths))
    matrix = torch.cat([low_rank(37, 667, 5).reshape(-1), randn(37)])
    assert best_spectrum(piece_of(matrix), len(matrix) // 3).layout.width == 667
