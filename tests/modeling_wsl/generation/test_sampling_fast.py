"""What inference in bfloat16 does differently, beside the plain way to do it."""

import copy
import threading
import time

import pytest
import torch
from halo_reference import naive_haloed

from modeling_wsl import WSLConfig, WSLModel
from modeling_wsl.backbone.encoding import decode_haloed, encode_stream, run_batch
from modeling_wsl.backbone.inference import batch_sizes, inference_backbone, num_workers, run_in_order
from modeling_wsl.backbone.positions import SinusoidalPositions
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


def test_a_model_of_one_type_is_no_copy_and_weights_that_need_no_cast_are_shared(model):
    assert inference_backbone(model) == (model, None)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert inference_backbone(narrow) == inference_backbone(narrow, "bfloat16") == (narrow, None)
    partly = copy.deepcopy(model)
    partly.decoder.to(torch.bfloat16)
    fast, dtype = inference_backbone(partly, "bfloat16")
    assert dtype is None and fast is not partly
    for one, two in zip(fast.decoder.parameters(), partly.decoder.parameters(), strict=True):
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
    assert num_workers(fast, 10) == num_workers(model, 10) == threads
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
