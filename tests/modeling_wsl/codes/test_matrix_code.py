import itertools

import pytest
import torch
from matrix_fixtures import SIZE, low_rank, mixed_window, pieces_of, randn, relative_error, structure_of, window_of

from modeling_wsl import WSLFeatureExtractor
from modeling_wsl.codes.low_rank import Piece, allocate, best_spectrum
from modeling_wsl.codes.matrix import HEADER, cut_pieces, decode_windows, encode_window, noise_scale, write_piece


LOW_RANK = [
    # rows, width, rank, first token: wide and tall, all and a part of the layer, a row's end within a token
    (24, 96, 4, 0),
    (96, 24, 4, 0),
    (96, 16, 3, 0),
    (200, 9, 2, 0),
    (24, 96, 4, 5),
    (90, 25, 3, 7),
    (41, 36, 4, 13),
]


@pytest.mark.parametrize("known", [True, False], ids=["row size known", "row size searched"])
@pytest.mark.parametrize(("rows", "width", "rank", "start"), LOW_RANK)
def test_a_matrix_of_low_rank_comes_back_to_float32_rounding(rows, width, rank, start, known):
    tokens, mask, positions = window_of(0.02 * low_rank(rows, width, rank), start=start)
    row_sizes = torch.full((len(tokens),), width) if known else None
    latents = encode_window(tokens, mask, positions, 12, row_sizes)
    assert latents.shape == (len(tokens), 12)
    assert latents.dtype == torch.float32
    found, found_mask = decode_windows(latents, SIZE)
    assert torch.equal(found_mask, mask)
    assert relative_error(found, tokens, mask) < 2e-6
    assert not mask.all() or (found[~mask] == 0).all()


def test_a_convolution_and_its_bias_are_found_by_the_row_sizes_of_a_manifest():
    kernel = (low_rank(32, 8 * 9, 5)).view(32, 8, 3, 3)
    extractor = WSLFeatureExtractor(token_size=SIZE)
    batch = extractor({"conv.weight": kernel, "conv.bias": randn(32), "norm.weight": randn(32), "scale": randn(())})
    row_sizes = batch["manifest"].row_sizes()
    latents = encode_window(batch["tokens"], batch["token_mask"], batch["positions"], 12, row_sizes)
    assert pieces_of(latents)[0].layout.width % 72 == 0
    state = extractor.decode(decode_windows(latents, SIZE)[0], batch["manifest"])
    torch.testing.assert_close(state["conv.weight"], kernel, rtol=1e-4, atol=1e-5)
    assert torch.equal(state["conv.bias"], batch["tokens"].view(-1)[32 * 72 : 32 * 73])  # outside of whole rows: as is


@pytest.mark.parametrize(("rows", "width"), [(60, 24), (60, 48), (120, 24)])
@pytest.mark.parametrize("latent_size", [8, 14, 20])
def test_white_noise_loses_what_the_best_weighted_svd_of_that_rank_loses(rows, width, latent_size):
    matrix = randn(rows, width)
    tokens = matrix.view(-1, SIZE)
    tokens = (tokens - tokens.mean(1, keepdim=True)) / tokens.std(1, correction=0, keepdim=True)
    # Scales of rows: errors count in units of them, and the code must weigh them so.
    scales = torch.logspace(-3, 0, rows).repeat_interleave(width // SIZE)[:, None]
    tokens, mask, positions = window_of(tokens * scales)
    latents = encode_window(tokens, mask, positions, latent_size, torch.full((len(tokens),), width))
    (piece,) = pieces_of(latents)
    layout, rank = piece.layout, len(piece.factors.pivots)
    assert layout.outside == 0
    found, _ = decode_windows(latents, SIZE)
    standardized = (tokens / scales).view(layout.rows, layout.width).double()
    expected = float(torch.linalg.svdvals(standardized)[rank:].square().sum())
    assert float(((found - tokens) / scales).double().square().sum()) == pytest.approx(expected, rel=1e-4)
    # It is the largest rank that there are numbers for.
    assert layout.numbers(rank) <= latents.numel() - 1 - HEADER < layout.numbers(rank + 1)


WINDOWS = [
    [torch.ones(1)],
    [randn(1), randn(1, seed=1), randn(1, seed=2)],
    [randn(SIZE)],
    [randn(SIZE + 1)],
    [randn(40, 40)],
    [randn(3, 500), randn(3), randn(500, 3), randn(500)],
    [randn(7, 5, seed=seed) for seed in range(20)],
    [low_rank(64, 48, 10), randn(64), low_rank(48, 64, 3), torch.zeros(64), torch.ones(64)],
]


@pytest.mark.parametrize("latent_size", [6, 8, 12, 13, 24, 64, 256])
@pytest.mark.parametrize("layers", WINDOWS, ids=range(len(WINDOWS)))
def test_the_numbers_of_every_window_fit_and_what_fits_as_it_is_comes_back_bit_by_bit(layers, latent_size):
    tokens, mask, positions = window_of(*layers)
    latents = encode_window(tokens, mask, positions, latent_size)
    pieces = pieces_of(latents)
    numbers = 1
    for piece in pieces:
        rank = 0 if piece.factors is None else len(piece.factors.pivots)
        numbers += HEADER + (piece.layout.numbers(rank) if rank else len(piece.kept))
    assert numbers <= latents.numel()
    assert (latents.view(-1)[numbers:] == 0).all()
    found, found_mask = decode_windows(latents, SIZE)
    assert torch.equal(found_mask, mask)
    assert relative_error(found, tokens, mask) <= 1 + 1e-6

    flat, at = torch.cat([layer.reshape(-1) for layer in layers]), 0
    for piece, layer in zip(pieces, layers, strict=True):
        assert piece.length == layer.numel()
        if piece.factors is None and len(piece.kept):
            assert torch.equal(piece.weights(), flat[at : at + piece.length])
        at += piece.length
    if latents.numel() >= 1 + HEADER * len(layers) + len(flat):
        assert torch.equal(found, tokens)


def test_a_window_of_512_tokens_of_many_layers_fits():
    layers = [low_rank(16, 96, 6, seed) + 0.1 * randn(16, 96, seed=seed + 30) for seed in range(7)]
    layers += [randn(16, seed=seed) for seed in range(64)]
    tokens, mask, positions = window_of(*layers)
    assert len(tokens) == 512
    latents = encode_window(tokens, mask, positions, 12, torch.full((512,), 96))
    assert len(pieces_of(latents)) == 71
    assert relative_error(decode_windows(latents, SIZE)[0], tokens, mask) < 0.6


@pytest.mark.parametrize(("rows", "width", "offset"), [(20, 30, 0), (30, 20, 7), (33, 9, 5)])
def test_a_piece_takes_as_many_numbers_as_its_layout_says(rows, width, offset):
    values = randn(rows * width).double()
    piece = Piece(values, torch.ones_like(values), offset)
    spectrum = best_spectrum(piece, len(values), [width])
    for rank in range(1, spectrum.layout.short):
        written = sum(map(len, write_piece(piece, spectrum, rank)))
        assert written == HEADER + spectrum.layout.numbers(rank)
    assert sum(map(len, write_piece(piece, spectrum, None))) == HEADER + len(piece)
    assert sum(map(len, write_piece(piece, spectrum, -1))) == HEADER


def test_more_numbers_never_lose_more():
    tokens, mask, positions = mixed_window()
    scale = tokens.double().std(1, keepdim=True).clamp_min(1e-6)
    errors = []
    for latent_size in range(8, 28, 2):
        found, _ = decode_windows(encode_window(tokens, mask, positions, latent_size), SIZE)
        errors.append(float(((found - tokens) / scale)[mask].square().sum()))
    for more, less in itertools.pairwise(errors):
        assert less <= 1.02 * more  # other widths are tried for other budgets
    assert errors[-1] < 0.05 * errors[0]


def test_pieces_end_where_layers_do_or_tokens_do_not_follow_each_other():
    tokens, mask, positions = window_of(randn(100), randn(50))
    lengths = [len(piece) for piece in cut_pieces(tokens.double(), mask, positions)]
    assert lengths == [100, 50]
    kept = torch.tensor([0, 1, 3, 4, 6, 7])  # without one token of each layer
    pieces = cut_pieces(tokens[kept].double(), mask[kept], positions[kept])
    assert [(len(piece), piece.offset) for piece in pieces] == [(48, 0), (28, 72), (26, 24)]
    assert torch.equal(torch.cat([piece.values for piece in pieces]), tokens[kept][mask[kept]].double())


def test_a_piece_ends_at_a_token_that_is_not_full():
    tokens, mask, positions = window_of(randn(100))
    mask[1, 10:] = False
    assert [len(piece) for piece in cut_pieces(tokens.double(), mask, positions)] == [34, 52]
    found, found_mask = decode_windows(encode_window(tokens, mask, positions, 30), SIZE)
    assert torch.equal(found_mask, mask)
    assert torch.equal(found[mask], tokens[mask])


def test_ranks_of_a_window_are_those_of_allocate():
    tokens, mask, positions = mixed_window()
    pieces = cut_pieces(tokens.double(), mask, positions)
    spectra = [best_spectrum(piece, -(-len(piece) // SIZE) * 12 - HEADER) for piece in pieces]
    expected = allocate(pieces, spectra, 12 * len(tokens) - 1 - HEADER * len(pieces))
    found = []
    for piece in pieces_of(encode_window(tokens, mask, positions, 12)):
        as_is = None if len(piece.kept) else -1
        found.append(as_is if piece.factors is None else len(piece.factors.pivots))
    assert found == expected
    assert any(rank is not None and rank > 0 for rank in found)


def test_windows_decode_together_as_each_alone_and_rows_of_zeros_are_no_weights():
    windows = [mixed_window(seed) for seed in range(3)]
    codes = [encode_window(*window, 12) for window in windows]
    alone = [decode_windows(code, SIZE) for code in codes]
    gap = torch.zeros(2, 12)
    together, mask = decode_windows(torch.cat([gap, codes[0], codes[1], gap, codes[2], gap]), SIZE)
    empty = torch.zeros(2, SIZE)
    expected = [empty, alone[0][0], alone[1][0], empty, alone[2][0], empty]
    assert torch.equal(together, torch.cat(expected))
    assert torch.equal(
        mask, torch.cat([empty.bool(), alone[0][1], alone[1][1], empty.bool(), alone[2][1], empty.bool()])
    )

    scales = noise_scale(torch.cat([codes[0], gap, codes[2]]), SIZE)
    assert torch.equal(scales, torch.cat([noise_scale(codes[0], SIZE), gap, noise_scale(codes[2], SIZE)]))


def test_the_same_window_gives_the_same_bytes():
    codes = [encode_window(*mixed_window(), 12) for _ in range(2)]
    assert torch.equal(codes[0].view(torch.int32), codes[1].view(torch.int32))


def test_what_is_no_weight_is_ignored():
    tokens, mask, positions = mixed_window()
    noisy = torch.where(mask, tokens, torch.nan)
    assert torch.equal(encode_window(noisy, mask, positions, 12), encode_window(tokens, mask, positions, 12))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_other_dtypes_are_taken(dtype):
    tokens, mask, positions = mixed_window()
    latents = encode_window(tokens.to(dtype), mask, positions, 40)
    assert torch.equal(decode_windows(latents, SIZE)[0], tokens.to(dtype).float())


def outlier(matrix, value):
    matrix = matrix.clone()
    matrix[5, 7] = value
    return matrix


HARD = {
    "constant": torch.full((30, 40), 0.7),
    "zeros": torch.zeros(30, 40),
    "rows of zeros": randn(30, 40) * (torch.arange(30) % 3 == 0)[:, None],
    "constant rows": torch.arange(30.0)[:, None].expand(30, 40),
    "constant but one row": torch.cat([torch.ones(29, 40), randn(1, 40)]),
    "identity": torch.eye(40),
    "equal rows": randn(1, 40).expand(30, 40),
    "an outlier": outlier(0.01 * randn(30, 40), 120_900.0),
    "tiny": 1e-30 * randn(30, 40),
    "denormal": 1e-42 * randn(30, 40),
    "huge": 1e36 * randn(30, 40),
    "scales from 1e-30 to 1e30": randn(30, 40) * torch.logspace(-30, 30, 30)[:, None],
    "rank one": low_rank(30, 40, 1),
}


@pytest.mark.parametrize("latent_size", [6, 12, 20])
@pytest.mark.parametrize("name", HARD)
def test_degenerate_layers_are_coded_finitely(name, latent_size):
    tokens, mask, positions = window_of(HARD[name], randn(1), torch.zeros(1), torch.ones(30), randn(30))
    latents = encode_window(tokens, mask, positions, latent_size)
    found, found_mask = decode_windows(latents, SIZE)
    assert torch.equal(found_mask, mask)
    assert found.isfinite().all()
    assert noise_scale(latents, SIZE).isfinite().all()
    layer = (positions[:, 1] == 0).nonzero().squeeze(1)
    errors, energies = ((t[layer].double() ** 2).sum(1) for t in (found - tokens, tokens))
    relative = errors / energies.clamp_min(1e-6 * float(energies.mean())).clamp_min(1e-300)
    assert relative.max() <= 2
    if name in ("constant", "zeros", "constant rows", "equal rows", "rank one"):
        assert relative.max() < 1e-10


def test_an_outlier_does_not_cost_the_others_their_precision():
    matrix = 0.01 * (low_rank(30, 48, 3) + 0.01 * randn(30, 48, seed=5))
    plain, mask, positions = window_of(matrix)
    spoiled, _, _ = window_of(outlier(matrix, 120_900.0))
    row_sizes = torch.full((len(plain),), 48)
    errors = []
    for tokens in (plain, spoiled):
        found, _ = decode_windows(encode_window(tokens, mask, positions, 12, row_sizes), SIZE)
        clean = torch.arange(len(tokens)) != 10  # the token with the outlier
        errors.append(float((found - tokens)[clean].square().mean().sqrt()))
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("failing", [["eigh"], ["eigh", "svd"], ["eigvalsh"], ["eigh", "eigvalsh", "svd"]])
def test_solvers_that_do_not_converge_do_not_stop_the_code(failing, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("failed to converge")

    window = mixed_window()
    expected, _ = decode_windows(encode_window(*window, 12), SIZE)
    for name in failing:
        monkeypatch.setattr(torch.linalg, name, fails)
    found, mask = decode_windows(encode_window(*window, 12), SIZE)
    assert torch.equal(mask, window[1])
    assert relative_error(found, window[0], mask) < 1
    if failing == ["eigh"]:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_noise_touches_no_structure_and_moves_every_row_by_about_its_deviation():
    latents = torch.cat([encode_window(*mixed_window(seed), 12) for seed in range(3)])
    scale = noise_scale(latents, SIZE)
    structure = structure_of(latents)
    assert (scale[structure] == 0).all()
    assert (scale[~structure] > 0).double().mean() > 0.99
    assert scale.isfinite().all()

    matrices = [(piece.layout, piece.factors.matrix(piece.layout)) for piece in pieces_of(latents) if piece.factors]
    assert len(matrices) >= 6
    for level in (0.02, 0.1):
        moved, count = [torch.zeros(m.shape[:1] if l.rows <= l.width else m.shape[1:]) for l, m in matrices], 20
        for seed in range(count):
            noisy = latents + level * randn(*latents.shape, seed=seed) * scale
            assert decode_windows(noisy, SIZE)[0].isfinite().all()
            found = [piece for piece in pieces_of(noisy) if piece.factors]
            for out, piece, (layout, matrix) in zip(moved, found, matrices, strict=True):
                change = piece.factors.matrix(layout) - matrix
                out += change.square().mean(1 if layout.rows <= layout.width else 0) / count
        for out, (layout, matrix) in zip(moved, matrices, strict=True):
            units = out.sqrt() / (level * matrix.std(1 if layout.rows <= layout.width else 0, correction=0))
            assert 0.75 < units.square().mean().sqrt() < 1.1
            assert units.min() > 0.4
            assert units.max() < 1.8


def test_a_constant_row_does_not_silence_the_others():
    matrix = 0.1 * (low_rank(30, 48, 6) + 0.1 * randn(30, 48, seed=3))
    matrix[4] = 1.0
    tokens, mask, positions = window_of(matrix)
    latents = encode_window(tokens, mask, positions, 12, torch.full((len(tokens),), 48))
    clean = decode_windows(latents, SIZE)[0].view(30, 48)
    noise = 0.05 * randn(*latents.shape) * noise_scale(latents, SIZE)
    moved = (decode_windows(latents + noise, SIZE)[0].view(30, 48) - clean).std(1) / matrix.std(1)
    varying = torch.arange(30) != 4
    assert 0.025 < moved[varying].median() < 0.075
