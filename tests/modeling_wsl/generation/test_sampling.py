import pytest
import torch
from halo_reference import encode_haloed, haloed_row, naive_haloed

from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone.encoding import HaloedWindows, decode_haloed, encode_stream
from modeling_wsl.generation.draws import draw_seeds, sample_latents


TOKEN_SIZE, LATENT_SIZE = 24, 10


def backbone(**options) -> WSLModel:
    """A backbone of some kB."""
    torch.manual_seed(0)
    config = WSLConfig(
        token_size=TOKEN_SIZE,
        latent_size=LATENT_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        window_size=8,
        initializer_range=0.2,
        **options,
    )
    return WSLModel(config).eval()


@pytest.fixture(scope="module")
def standardizing() -> WSLModel:
    """With the options of our own sizes."""
    return backbone(token_standardization=True, linear_path=True)


@pytest.fixture(scope="module", params=["paper", "standardizing"])
def model(request, standardizing) -> WSLModel:
    return standardizing if request.param == "standardizing" else backbone()


def sequence(num_tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    token_mask = torch.ones(num_tokens, TOKEN_SIZE, dtype=torch.bool)
    token_mask[::5, 7:] = False
    index = torch.arange(num_tokens)
    return {
        "tokens": torch.randn(num_tokens, TOKEN_SIZE, generator=generator) * token_mask,
        "token_mask": token_mask,
        "positions": torch.stack([index + 1000, index // 6, index % 6], dim=1),
    }


@pytest.mark.parametrize(("window_size", "halo"), [(5, 2), (4, 0), (3, 4), (1, 1)])
def test_haloed_encoding_and_decoding_equal_the_naive_loop_for_every_length(model, window_size, halo):
    for num_tokens in range(1, 3 * window_size + 2 * halo + 1):
        fields = sequence(num_tokens)
        latents = encode_haloed(model, **fields, window_size=window_size, halo=halo, batch_size=2)
        expected = naive_haloed(model.encode, fields, window_size, halo)
        torch.testing.assert_close(latents, expected, atol=2e-5, rtol=1e-4)
        inputs = {"latents": latents, "positions": fields["positions"]}
        tokens = decode_haloed(model, **inputs, window_size=window_size, halo=halo, batch_size=3)
        torch.testing.assert_close(tokens, naive_haloed(model.decode, inputs, window_size, halo), atol=2e-5, rtol=1e-4)


def test_every_latent_belongs_to_the_token_of_its_index_whatever_the_length(standardizing):
    """With its deep path off, a linear backbone sees one token at a time: halo and order cannot matter."""
    linear = WSLModel(standardizing.config).eval()
    linear.initialize_linear_path(torch.eye(TOKEN_SIZE)[: LATENT_SIZE - 2], torch.zeros(TOKEN_SIZE))
    for num_tokens in range(1, 60):
        fields = sequence(num_tokens)
        latents = encode_haloed(linear, **fields, window_size=8, halo=3)
        with torch.no_grad():
            whole = linear.encode(**{name: value[None] for name, value in fields.items()})[0]
        torch.testing.assert_close(latents, whole, atol=1e-5, rtol=1e-5)


def test_every_token_has_one_window_and_its_whole_halo():
    for window_size, halo in [(1, 0), (1, 2), (3, 1), (4, 4), (8, 3), (5, 11)]:
        for num_tokens in range(70):
            windows = HaloedWindows(num_tokens, window_size, halo)
            covered = []
            for index in range(len(windows)):
                start, stop = windows.core(index)
                first, last = windows.row_start(index), windows.row_start(index) + windows.row_length
                assert 0 <= first <= max(start - halo, 0)
                assert min(stop + halo, num_tokens) <= last <= num_tokens
                covered += range(start, stop)
                row = haloed_row(start, num_tokens, window_size, halo)
                assert [row[0], row[-1] + 1] == [first, last]
            assert covered == list(range(num_tokens))


@pytest.mark.parametrize("piece", [1, 7, 16, 100])
def test_a_stream_of_pieces_of_any_size_gives_the_latents_of_the_whole(model, piece):
    for num_tokens in (1, 13, 40, 61):
        fields = sequence(num_tokens)
        chunks = (
            {name: value[at : at + piece] for name, value in fields.items()} for at in range(0, num_tokens, piece)
        )
        parts = list(encode_stream(model, chunks, num_tokens, window_size=8, halo=3, batch_size=2))
        starts = [start for start, _ in parts]
        assert starts == [sum(len(part) for _, part in parts[:index]) for index in range(len(parts))]
        whole = encode_haloed(model, **fields, window_size=8, halo=3)
        torch.testing.assert_close(torch.cat([part for _, part in parts]), whole, atol=1e-5, rtol=1e-5)


def test_a_stream_of_another_length_than_announced_is_refused(model):
    fields = sequence(20)
    for num_tokens in (19, 21):
        with pytest.raises(ValueError, match=f"num_tokens says {num_tokens}"):
            list(encode_stream(model, [fields], num_tokens, window_size=8, halo=2))


def test_no_tokens_give_no_latents(model):
    fields = sequence(0)
    assert encode_haloed(model, **fields).shape == (0, LATENT_SIZE)
    assert decode_haloed(model, torch.empty(0, LATENT_SIZE), fields["positions"]).shape == (0, TOKEN_SIZE)


def test_impossible_windows_and_positions_are_refused_by_name(model):
    fields = sequence(9)
    with pytest.raises(ValueError, match="window_size is 0"):
        encode_haloed(model, **fields, window_size=0)
    with pytest.raises(ValueError, match="halo is -1"):
        encode_haloed(model, **fields, halo=-1)
    with pytest.raises(ValueError, match=r"positions have shape \(8, 3\), expected \(9, 3\)"):
        decode_haloed(model, torch.zeros(9, LATENT_SIZE), fields["positions"][:8])
    with pytest.raises(ValueError, match="autocast_dtype='bf16'"):
        encode_haloed(model, **fields, autocast_dtype="bf16")


def test_bfloat16_autocast_returns_float32_near_the_exact_latents(model):
    fields = sequence(30)
    exact = encode_haloed(model, **fields, window_size=8, halo=2)
    fast = encode_haloed(model, **fields, window_size=8, halo=2, autocast_dtype="bfloat16")
    assert fast.dtype == torch.float32
    assert not torch.equal(fast, exact)
    assert (fast - exact).norm() < 0.03 * exact.norm()


@pytest.fixture
def anchors() -> torch.Tensor:
    return torch.randn(3, 400, LATENT_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(anchors, noise):
    draws = [sample_latents(anchors, 0.2, noise, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_shared_noise_is_one_anchor_and_one_vector_for_all_tokens(anchors):
    chosen = set()
    for seed in range(20):
        draw = sample_latents(anchors, 0.2, "shared", torch.Generator().manual_seed(seed))
        offsets = draw - anchors  # [anchors, T, latent_size]
        spread = (offsets - offsets[:, :1]).abs().amax((1, 2))
        assert int(spread.argmin()) not in set((spread > 1e-5).nonzero().flatten().tolist())
        assert int((spread < 1e-5).sum()) == 1
        assert offsets[spread.argmin(), 0].abs().min() > 0
        chosen.add(int(spread.argmin()))
    assert chosen == {0, 1, 2}


def test_independent_noise_mixes_the_anchors_and_has_the_bandwidth_as_its_deviation(anchors):
    far = anchors + 100 * torch.arange(3)[:, None, None]
    draw = sample_latents(far, 0.2, "independent", torch.Generator().manual_seed(1))
    distance, chosen = (draw - far).abs().amax(-1).min(0)  # [T]
    assert distance.max() < 2
    assert torch.bincount(chosen, minlength=3).min() > 90
    residual = draw - far[chosen, torch.arange(400)]
    assert residual.std() == pytest.approx(0.2, rel=0.05)
    assert residual.mean() == pytest.approx(0, abs=0.01)
    assert not torch.allclose(residual[0], residual[1], atol=1e-3)


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_bandwidth_zero_returns_the_anchor_and_leaves_it_alone(anchors, noise):
    before = anchors.clone()
    draw = sample_latents(anchors[:1], 0, noise, torch.Generator().manual_seed(1))
    assert torch.equal(draw, anchors[0])
    draw.zero_()
    assert torch.equal(anchors, before)


def test_noise_on_a_mean_is_measured_in_the_deviation_of_its_token(standardizing):
    anchors = torch.zeros(1, 50, LATENT_SIZE)
    anchors[..., -1] = torch.linspace(-8, 0, 50)  # log standard deviations
    draw = sample_latents(anchors, 0.2, "shared", torch.Generator().manual_seed(3), standardizing.noise_scale)
    offset = draw - anchors[0]
    torch.testing.assert_close(offset[:, -2] / anchors[0, :, -1].exp(), offset[-1, -2].expand(50))
    assert offset[0, -2].abs() < 1e-3


def test_the_first_seeds_do_not_depend_on_how_many_draws_there_are():
    assert draw_seeds(7, 20)[:5] == draw_seeds(7, 5)
    assert draw_seeds(7, 5) != draw_seeds(8, 5)
    assert len(set(draw_seeds(7, 1000))) == 1000


def test_impossible_draws_are_refused_by_name(anchors):
    with pytest.raises(ValueError, match="bandwidth is -1"):
        sample_latents(anchors, -1)
    with pytest.raises(ValueError, match="noise='common'"):
        sample_latents(anchors, 0.2, "common")
    with pytest.raises(ValueError, match=r"\(400, 10\)"):
        sample_latents(anchors[0])
