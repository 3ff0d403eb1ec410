"""What inference in bfloat16 does differently, beside the plain way to do it."""

import copy
import math
import threading
import time

import pytest
import torch
from halo_reference import naive_haloed

from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone import window_attention as attention
from modeling_wsl.backbone.encoding import decode_haloed, encode_stream, run_batch
from modeling_wsl.backbone.inference import PositionsByTable, inference_backbone
from modeling_wsl.backbone.positions import SinusoidalPositions
from modeling_wsl.backbone.window_attention import attend_without_gradients
from modeling_wsl.backbone.window_workers import batch_sizes, num_workers, run_in_order
from modeling_wsl.generation.draws import sample_latents


@pytest.fixture(scope="module", params=["paper", "ours"])
def model(request) -> WSLModel:
    torch.manual_seed(0)
    ours = {"token_standardization": True, "linear_path": True} if request.param == "ours" else {}
    config = WSLConfig(
        token_size=24, latent_size=10, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **ours
    )
    return WSLModel(config).eval()


@pytest.fixture
def threads():
    """As many threads as the fast path is to be tried with, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def fields_of(num_tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    token_mask = torch.ones(num_tokens, 24, dtype=torch.bool)
    token_mask[::5, 7:] = False
    index = torch.arange(num_tokens)
    return {
        "tokens": torch.randn(num_tokens, 24, generator=generator) * token_mask,
        "token_mask": token_mask,
        "positions": torch.stack([index + 70_000, index // 6, index % 6], dim=1),
    }


def states(batch: int, heads: int, tokens: int, head_dim: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Query, key and value, strided as a projection's output is."""
    generator = torch.Generator().manual_seed(tokens)
    shape = batch, tokens, heads, head_dim
    return [scale * torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for _ in "qkv"]


def exact_attention(query, key, value, lengths, scaling) -> torch.Tensor:
    scores = query.double() @ key.double().mT * scaling
    for row, length in enumerate(lengths or ()):
        scores[row, :, :, length:] = -math.inf
    return (scores.softmax(-1).nan_to_num() @ value.double()).transpose(1, 2)


@pytest.mark.parametrize("max_scores", [1, 20, 100, 1 << 21])
def test_attention_without_a_softmax_is_attention_in_blocks_of_any_size(monkeypatch, max_scores):
    monkeypatch.setattr(attention, "MAX_SCORES", max_scores)
    for batch, heads, tokens, head_dim in [(1, 1, 1, 4), (3, 2, 9, 8), (2, 5, 17, 16)]:
        for lengths in (None, [tokens, 1, 0][:batch], [max(tokens - 3, 0)] * batch):
            query, key, value = states(batch, heads, tokens, head_dim)
            result = attend_without_gradients(query, key, value, lengths, head_dim**-0.5)
            assert result.is_contiguous()
            expected = exact_attention(query, key, value, lengths, head_dim**-0.5)
            torch.testing.assert_close(result.double(), expected, atol=0.03, rtol=0.03)


def test_attention_is_about_as_exact_as_torchs_own():
    query, key, value = states(2, 4, 300, 32)
    expected = exact_attention(query, key, value, None, 32**-0.5)
    own = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    result = attend_without_gradients(query, key, value, None, 32**-0.5)
    assert (result - expected).norm() < 3 * (own - expected).norm()


def test_attention_takes_large_scores_and_leaves_extreme_ones_to_others():
    query, key, value = states(2, 2, 50, 16, scale=2.5)
    scores = (query.float() @ key.float().mT) / 4
    assert scores.abs().max() > 20
    result = attend_without_gradients(query, key, value, None, 0.25)
    expected = exact_attention(query, key, value, None, 0.25)
    rounded = (scores.bfloat16().softmax(-1) @ value).transpose(1, 2)  # the textbook's, with scores rounded likewise
    assert (result - expected).norm() < 1.5 * (rounded - expected).norm() < 0.1 * expected.norm()
    for scale in (20.0, -20.0):
        large = torch.full_like(key, scale)
        assert attend_without_gradients(torch.full_like(query, 20.0), large, value, None, 0.25) is None
    key[1, 0, 3] = math.nan
    assert attend_without_gradients(query, key, value, None, 0.25) is None


@pytest.mark.parametrize("dim", [2, 34, 384])
def test_positions_by_table_are_the_sinusoidal_ones_up_to_millions(dim):
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(600).repeat(3, 1).T, torch.randint(6_000_000, (400, 3), generator=generator)])
    positions = positions.view(2, 500, 3)
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2).double() / dim)
    angles = positions[..., None].double() * frequencies  # [2, 500, 3, dim/2]
    expected = torch.stack([angles.sin().sum(2), angles.cos().sum(2)], dim=-1).flatten(-2)
    result = PositionsByTable(dim)(positions)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(result, SinusoidalPositions(dim)(positions), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="must be integers"):
        PositionsByTable(dim)(positions.float())


def test_a_copy_for_inference_is_autocast_to_rounding_and_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    fast, dtype = inference_backbone(model, "bfloat16")
    assert dtype is None and fast is not model
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    fields = {name: value[None] for name, value in fields_of(40).items()}
    exact = run_batch(model, model.encode, fields, None)
    rounded = run_batch(model, model.encode, fields, torch.bfloat16)
    latents = run_batch(fast, fast.encode, fields, None)
    assert latents.dtype == rounded.dtype
    assert (latents - exact).norm() < 1.5 * (rounded - exact).norm() < 0.03 * exact.norm()
    fields = {"latents": exact, "positions": fields["positions"]}
    exact = run_batch(model, model.decode, fields, None)
    rounded = run_batch(model, model.decode, fields, torch.bfloat16)
    assert (run_batch(fast, fast.decode, fields, None) - exact).norm() < 1.5 * (rounded - exact).norm()
    assert isinstance(model.positions, SinusoidalPositions) and model.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert inference_backbone(fast) == inference_backbone(fast, "bfloat16") == (fast, None)


def test_a_model_in_float32_is_no_copy_and_one_in_bfloat16_shares_its_weights(model):
    assert inference_backbone(model) == (model, None)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    fast, dtype = inference_backbone(narrow)
    assert dtype is None and isinstance(fast.positions, PositionsByTable)
    for one, two in zip(fast.parameters(), narrow.parameters(), strict=True):
        assert one.data_ptr() == two.data_ptr()
    with pytest.raises(ValueError, match="autocast_dtype='bf16'"):
        inference_backbone(model, "bf16")


def test_weights_of_several_types_or_elsewhere_are_left_to_autocast(model):
    mixed = copy.deepcopy(model)
    mixed.decoder.proj_out.half()
    assert inference_backbone(mixed, "bfloat16") == (mixed, torch.bfloat16)
    assert inference_backbone(mixed) == (mixed, None)
    with torch.device("meta"):
        absent = WSLModel(model.config)
    assert inference_backbone(absent, "bfloat16") == (absent, torch.bfloat16)


@pytest.mark.parametrize("num_tokens", [1, 30, 61, 200])
def test_haloed_windows_on_several_threads_are_those_of_the_naive_loop(model, threads, num_tokens):
    fast, _ = inference_backbone(model, "bfloat16")
    assert num_workers(fast, 10) == threads and num_workers(model, 10) == 1
    fields = fields_of(num_tokens)
    chunks = [{name: value[at : at + 50] for name, value in fields.items()} for at in range(0, num_tokens, 50)]
    options = {"window_size": 8, "halo": 3, "autocast_dtype": "bfloat16"}
    parts = list(encode_stream(model, iter(chunks), num_tokens, batch_size=4, **options))
    starts = [start for start, _ in parts]
    assert starts == [sum(len(part) for _, part in parts[:index]) for index in range(len(parts))]
    latents = torch.cat([part for _, part in parts])
    assert latents.dtype == torch.float32
    exact = naive_haloed(model.encode, fields, 8, 3)
    assert (latents - exact).norm() < 0.03 * exact.norm()
    tokens = decode_haloed(model, latents, fields["positions"], batch_size=4, **options)
    exact = naive_haloed(model.decode, {"latents": latents, "positions": fields["positions"]}, 8, 3)
    assert (tokens - exact).norm() < 0.03 * exact.norm()
    again = decode_haloed(model, latents, fields["positions"], batch_size=4, **options)
    assert torch.equal(tokens, again)
    assert torch.get_num_threads() == threads


def test_a_stream_of_another_length_is_refused_on_several_threads_too(model, threads):
    for num_tokens in (95, 150):
        with pytest.raises(ValueError, match=f"num_tokens says {num_tokens}"):
            list(encode_stream(model, [fields_of(100)], num_tokens, window_size=8, autocast_dtype="bfloat16"))
    assert torch.get_num_threads() == threads


def test_batches_share_the_rows_evenly_among_the_workers():
    for num_rows in range(60):
        for batch_size in (1, 3, 8):
            assert (
                batch_sizes(num_rows, batch_size, 1)
                == [len(x) for x in torch.arange(num_rows).split(batch_size)][: -(-num_rows // batch_size)]
            )
            for workers in (2, 5):
                sizes = batch_sizes(num_rows, batch_size, workers)
                assert sum(sizes) == num_rows and max(sizes, default=1) <= batch_size
                assert min(sizes, default=1) >= max(sizes, default=1) - 1 >= 0
                assert len(sizes) % workers == 0 or set(sizes) == {1}


def test_results_come_in_order_from_as_many_threads_as_there_are_workers(threads):
    seen, taken, meet = set(), [], threading.Barrier(2)

    def slow(number: int) -> tuple[int, int]:
        if number < 2:
            meet.wait(timeout=30)  # only together
        time.sleep(0.01 * (number % 3))
        seen.add(threading.get_ident())
        return number, torch.get_num_threads()

    def numbers():
        for number in range(20):
            taken.append(number)
            yield number

    for index, (number, own_threads) in enumerate(run_in_order(slow, numbers(), 2)):
        assert number == index and own_threads == threads // 2
        assert len(taken) <= index + 4  # the one at hand, two that are worked on, and the next
    assert len(taken) == 20 and len(seen) == 2 and threading.get_ident() not in seen
    assert torch.get_num_threads() == threads


def test_an_error_of_one_batch_reaches_the_caller_and_threads_are_as_before(threads):
    def fail(number: int) -> int:
        if number == 3:
            raise ValueError("the third")
        return number

    with pytest.raises(ValueError, match="the third"):
        list(run_in_order(fail, range(10), 2))
    results = run_in_order(fail, range(10), 2)
    assert next(results) == 0
    results.close()  # a consumer that stops early
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_a_draw_in_pieces_is_the_formula_on_the_whole(noise):
    torch.manual_seed(0)
    model = WSLModel(WSLConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, token_standardization=True))
    anchors = torch.randn(2, 3000, 128)
    for scale in (None, model.noise_scale):
        draw = sample_latents(anchors, 0.3, noise, torch.Generator().manual_seed(1), scale)
        generator = torch.Generator().manual_seed(1)
        index = torch.randint(2, (1,) if noise == "shared" else (3000,), generator=generator)
        epsilon = torch.randn((128,) if noise == "shared" else (3000, 128), generator=generator)
        chosen = anchors[index[0]] if noise == "shared" else anchors[index, torch.arange(3000)]
        assert torch.equal(draw, chosen + 0.3 * epsilon * (1 if scale is None else scale(chosen)))
