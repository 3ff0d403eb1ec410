import pytest
import torch
from matrix_fixtures import SIZE, low_rank, mixed_window, randn, relative_error, structure_of, window_of

from modeling_wsl.codes.matrix import MatrixCodeError, decode_windows, encode_window, noise_scale


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value):
    tokens, mask, positions = mixed_window()
    tokens[3, 5] = value
    with pytest.raises(MatrixCodeError, match="tokens hold a NaN or an infinity"):
        encode_window(tokens, mask, positions, 12)


@pytest.mark.parametrize("change", ["empty token", "hole", "no first entry"])
def test_masks_that_are_not_of_dense_tokens_are_refused(change):
    tokens, mask, positions = mixed_window()
    mask[2, {"empty token": slice(None), "hole": 4, "no first entry": 0}[change]] = False
    with pytest.raises(MatrixCodeError, match="token_mask: token 2 .*attention_mask"):
        encode_window(tokens, mask, positions, 12)


def test_too_few_numbers_for_the_headers_are_refused():
    tokens, mask, positions = window_of(randn(1), randn(1), randn(1))
    with pytest.raises(MatrixCodeError, match=r"3 tokens of 3 layers has 12 numbers.* 13.*latent_size above 4"):
        encode_window(tokens, mask, positions, 4)
    assert encode_window(tokens, mask, positions, 5).shape == (3, 5)


def test_factors_too_large_for_float32_are_refused():
    tokens, mask, positions = window_of(randn(30, 40).double())
    with pytest.raises(MatrixCodeError, match="too large for float32"):
        encode_window(tokens.double() * 1e60, mask, positions, 12)


def test_layers_that_hold_more_tokens_than_their_window_are_refused():
    latents = torch.zeros(2, 12)
    latents[0, :5] = torch.tensor([2.0, 1200.0, 0.0, 0.0, 1.0])  # two tokens, of a layer of 1,200 zeros
    for function in (decode_windows, noise_scale):
        with pytest.raises(MatrixCodeError, match="2 tokens should begin a layer.*1200"):
            function(latents, SIZE)


def test_latents_cut_in_the_middle_of_a_window_are_refused():
    latents = torch.cat([encode_window(*mixed_window(seed), 12) for seed in range(2)])
    length = len(latents) // 2
    for start, stop in [(0, length - 1), (0, len(latents) - 1), (0, length + 5)]:
        with pytest.raises(MatrixCodeError, match="is no number of tokens from 1"):
            decode_windows(latents[start:stop], SIZE)
    begun = [start for start in range(1, length) if latents[start:length].any()]  # zeros fill a window up
    assert len(begun) > 60
    for start in begun:
        with pytest.raises(MatrixCodeError, match="Decode whole windows"):
            decode_windows(latents[start:], SIZE)


def test_latents_rounded_to_bfloat16_are_refused_where_that_changes_the_structure():
    for length, is_exact in ((1200, True), (1201, False)):  # the first is a multiple of 8
        tokens, mask, positions = window_of(randn(length))
        latents = encode_window(tokens, mask, positions, 30).bfloat16()
        if is_exact:
            assert relative_error(decode_windows(latents, SIZE)[0], tokens, mask) < 0.01
        else:
            with pytest.raises(MatrixCodeError, match="float32"):
                decode_windows(latents, SIZE)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_latents_that_are_not_finite_are_refused(value):
    latents = encode_window(*mixed_window(), 12)
    for row, column in [(0, 0), (0, 2), (4, 3), (len(latents) - 1, 11)]:
        spoiled = latents.clone()
        spoiled[row, column] = value
        for function in (decode_windows, noise_scale):
            with pytest.raises(MatrixCodeError, match="latents hold a NaN or an infinity"):
                function(spoiled, SIZE)


def test_random_numbers_are_refused():
    for seed in range(20):
        with pytest.raises(MatrixCodeError, match="Token 0 should begin a window"):
            decode_windows(randn(10, 12, seed=seed), SIZE)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 3.0, "Token 3 should begin a window"),
        (0, 2.5, "Token 0 should begin a window.*2.5"),
        (0, -1.0, "Token 0 should begin a window"),
        (0, 0.0, "Token 0 should begin a window"),
        (1, 0.0, "Number 1 of a window.*should begin a layer"),
        (1, -20.0, "should begin a layer"),
        (1, 1e30, "should begin a layer"),
        (2, 1e9, "should begin a layer"),
        (3, -40.0, "should begin a layer"),
        (3, 1e9, "should begin a layer"),
        (4, 0.0, "should begin a layer"),
        (4, 30.0, "should begin a layer"),
        (4, 1e9, "should begin a layer"),
        (5, -1.0, "pivots of a matrix with 30 rows"),
        (5, 29.0, "pivots"),
        (5, 0.5, "pivots"),
        (-1, 1.0, "follow are not all 0"),
    ],
)
def test_every_wrong_number_of_the_structure_is_named(at, value, message):
    tokens, mask, positions = window_of(low_rank(30, 40, 9) + 0.2 * randn(30, 40, seed=3))
    latents = encode_window(tokens, mask, positions, 12, torch.full((len(tokens),), 40)).view(-1)
    assert latents[1:4].tolist() == [1200, 0, 40]
    latents[at] = value
    for function in (decode_windows, noise_scale):
        with pytest.raises(MatrixCodeError, match=message):
            function(latents.view(-1, 12), SIZE)


def corrupt(latents, generator):
    def draw(high):
        return int(torch.randint(high, (1,), generator=generator))

    kind, flat = draw(8), latents.clone().view(-1)
    if kind == 0:  # another number where there is structure
        places = structure_of(latents).view(-1).nonzero().squeeze(1)
        flat[places[draw(len(places))]] = float(draw(3000) - 50)
    elif kind == 1:  # any other numbers
        flat[torch.randint(len(flat), (20,), generator=generator)] = torch.randn(20, generator=generator)
    elif kind == 2:  # too much noise everywhere
        flat += 10 ** (-8.0 + draw(10)) * torch.randn(len(flat), generator=generator)
    elif kind == 3:  # rows in another order
        return latents[torch.randperm(len(latents), generator=generator)]
    elif kind == 4:  # cut
        return latents[draw(len(latents)) :]
    elif kind == 5:  # shifted
        flat = flat.roll(1 + draw(30))
    elif kind == 6:  # whole numbers anywhere
        flat[torch.randint(len(flat), (5,), generator=generator)] = torch.randint(
            99, (5,), generator=generator
        ).float()
    else:
        flat *= 10.0 ** (draw(80) - 40)
    return flat.view(latents.shape)


def test_corrupted_latents_are_decoded_or_refused_and_nothing_else():
    latents = torch.cat([encode_window(*mixed_window(seed), 12) for seed in range(2)])
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        corrupted = corrupt(latents, generator)
        for function in (decode_windows, noise_scale):
            try:
                function(corrupted, SIZE)
            except MatrixCodeError as error:
                assert len(str(error)) > 40
                refused += 1
    assert 300 < refused < 600  # some changes are of weights only
