"""Whole models through the matrix code: windows in, tokens out, draws around anchors."""

import pytest
import torch
from generation_fixtures import EXTRACTOR, Net, same, trained
from matrix_fixtures import SIZE, mixed_window

from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel
from modeling_wsl.backbone.encoding import cut_windows, decode_haloed, encode_stream
from modeling_wsl.codes.matrix import window_bounds
from modeling_wsl.generation.draws import sample_latents
from modeling_wsl.generation.generate import generate
from modeling_wsl.generation.plan import plan_generation
from modeling_wsl.generation.settings import GenerationSettings


def backbone(token_size=SIZE, latent_size=16, **options):
    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | options
    config = WSLConfig(
        token_size=token_size, latent_size=latent_size, latent_code="matrix", token_standardization=True, **options
    )
    return WSLModel(config).eval()


def small_backbone():
    extractor = EXTRACTOR
    return backbone(extractor.token_size, max(8, extractor.token_size // 2), window_size=16)


def pieces_of(fields, size):
    starts = range(0, len(fields["tokens"]), size)
    return [{name: value[at : at + size] for name, value in fields.items()} for at in starts]


def window_fields():
    return dict(zip(("tokens", "token_mask", "positions"), mixed_window(), strict=True))


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_windows_do_not_depend_on_the_pieces_that_they_come_in(chunk):
    fields = window_fields()
    total = len(fields["tokens"])
    windows = list(cut_windows(pieces_of(fields, chunk), total, 32))
    assert [start for start, _ in windows] == list(range(0, total, 32))
    for name, whole in fields.items():
        assert torch.equal(torch.cat([window[name] for _, window in windows]), whole)


def test_a_sequence_of_another_length_than_stated_is_refused():
    fields = window_fields()
    with pytest.raises(ValueError, match="manifest.num_tokens"):
        list(cut_windows([fields], len(fields["tokens"]) + 1, 32))


def test_a_whole_model_is_encoded_window_by_window_and_decoded_at_once():
    model, fields = backbone(), window_fields()
    total = len(fields["tokens"])
    latents = torch.cat([part for _, part in encode_stream(model, pieces_of(fields, 50), total, window_size=32)])
    assert window_bounds(latents) == [(start, min(start + 32, total)) for start in range(0, total, 32)]
    for start in range(0, total, 32):
        alone = model.encode(**{name: value[None, start : start + 32] for name, value in fields.items()})
        assert torch.equal(latents[start : start + 32], alone[0])
    decoded = decode_haloed(model, latents, fields["positions"], window_size=20, halo=4)
    factors, _ = model.code.undo(latents[None])
    assert torch.equal(decoded, factors[0])  # the network is silent before training


def test_a_trained_network_corrects_with_the_context_of_the_halo():
    model, fields = backbone(), window_fields()
    torch.nn.init.normal_(model.decoder.proj_out.weight, std=0.1)
    total = len(fields["tokens"])
    latents = torch.cat([part for _, part in encode_stream(model, [fields], total, window_size=32)])
    decoded = decode_haloed(model, latents, fields["positions"], window_size=total, halo=0)
    torch.testing.assert_close(decoded, model.decode(latents[None], fields["positions"][None])[0])
    assert not torch.equal(decoded, model.code.undo(latents[None])[0][0])


def test_row_sizes_of_the_manifest_are_used_where_the_pieces_bring_it():
    weights = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        3, 169, generator=torch.Generator().manual_seed(1)
    )
    extractor = WSLFeatureExtractor(token_size=SIZE)
    source = {"fc.weight": weights + 0, "fc.bias": torch.randn(40, generator=torch.Generator().manual_seed(2))}
    manifest = extractor.manifest(source, min_parameters=0)
    assert set(manifest.row_sizes().tolist()) == {169}
    chunks = list(extractor.stream(source, window_size=100, min_parameters=0))
    model = backbone(latent_size=12)
    latents = torch.cat([part for _, part in encode_stream(model, chunks, manifest.num_tokens, window_size=300)])
    decoded = decode_haloed(model, latents, manifest.positions())
    state = extractor.decode(decoded, manifest, carried={})
    torch.testing.assert_close(state["fc.weight"], weights, rtol=1e-3, atol=1e-4)


def test_row_sizes_are_those_of_the_layers_largest_tensor_wherever_one_begins():
    source = {"a.weight": torch.randn(6, 4, 3, 3), "a.bias": torch.randn(6), "b.weight": torch.randn(50)}
    manifest = WSLFeatureExtractor(token_size=10).manifest(source, min_parameters=0)
    sizes = manifest.row_sizes()
    first = manifest.layers[1].first_token
    assert sizes[:first].unique().tolist() == [36]
    assert sizes[first:].unique().tolist() == [50]
    assert torch.equal(manifest.row_sizes(3, first + 2), sizes[3 : first + 2])


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_a_draw_takes_one_anchor_whole_and_leaves_its_structure_alone(noise):
    model, fields = backbone(), window_fields()
    total = len(fields["tokens"])
    first = torch.cat([part for _, part in encode_stream(model, [fields], total, window_size=32)])
    other = {**fields, "tokens": 3 * fields["tokens"]}
    second = torch.cat([part for _, part in encode_stream(model, [other], total, window_size=32)])
    anchors = torch.stack([first, second])
    chosen = set()
    for seed in range(8):
        draw = sample_latents(
            anchors, 0.1, noise, torch.Generator().manual_seed(seed), model.noise_scale, one_anchor=True
        )
        distances = (draw - anchors).square().sum((1, 2))
        nearest = int(distances.argmin())
        chosen.add(nearest)
        fixed = model.noise_scale(anchors[nearest]) == 0
        assert torch.equal(draw[fixed], anchors[nearest][fixed])
        assert not torch.equal(draw, anchors[nearest])
        assert torch.isfinite(decode_haloed(model, draw, fields["positions"])).all()
    assert chosen == {0, 1}
    unmoved = sample_latents(anchors[:1], 0.0, noise, noise_scale=model.noise_scale, one_anchor=True)
    assert torch.equal(unmoved, first)


def test_models_are_generated_around_anchors_and_the_same_seed_gives_the_same_bytes():
    anchors = [trained(Net(), seed) for seed in range(2)]
    model = small_backbone()

    def draws(**options):
        settings = GenerationSettings(num_samples=2, progress=False, **options)
        return generate(model, plan_generation(EXTRACTOR, Net(), anchors, settings))

    once, again = draws(seed=3), draws(seed=3)
    assert all(same(one.state_dict, two.state_dict) for one, two in zip(once, again, strict=True))
    assert not same(once[0].state_dict, draws(seed=4)[0].state_dict)


def test_what_factors_cannot_do_is_refused():
    model = small_backbone()
    settings = GenerationSettings(method="interpolation", progress=False)
    plan = plan_generation(EXTRACTOR, Net(), [trained(Net(), seed) for seed in range(2)], settings)
    with pytest.raises(ValueError, match="Draw around the anchors"):
        generate(model, plan)


def test_inference_mode_and_no_grad_may_follow_each_other_in_any_thread():
    model = backbone(hidden_size=32, window_size=16).to(torch.bfloat16)
    fields, threads = window_fields(), torch.get_num_threads()
    total = len(fields["tokens"])
    try:
        torch.set_num_threads(2)
        latents = torch.cat([part for _, part in encode_stream(model, [fields], total, window_size=16)])
        found = []
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                found.append(decode_haloed(model, latents, fields["positions"], window_size=16, halo=2))
                features = encode_stream(model, [fields], total, window_size=16, features=True)
                found.append(torch.cat([part for _, part in features]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_factors_are_computed_on_the_cpu_in_float32_whatever_new_tensors_are():
    model, fields = backbone(), {name: value[None] for name, value in window_fields().items()}
    latents = model.encode(**fields)
    kind = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = model.encode(**fields)
            decoded, _ = model.code.undo(again)
    finally:
        torch.set_default_dtype(kind)
    assert torch.equal(again, latents) and latents.dtype == torch.float32
    assert torch.equal(decoded, model.code.undo(latents)[0])


def test_row_sizes_and_masks_of_other_shapes_are_refused_in_words():
    model, fields = backbone(), {name: value[None] for name, value in window_fields().items()}
    with pytest.raises(ValueError, match="needs its batch dimension"):
        model.encode(**fields, row_sizes=torch.ones(fields["tokens"].shape[1], dtype=torch.int64))
    mask = torch.ones(1, 1, 1, fields["tokens"].shape[1], dtype=torch.bool)
    with pytest.raises(ValueError, match="which tokens the factors are of"):
        model.decode(model.encode(**fields), attention_mask=mask)
