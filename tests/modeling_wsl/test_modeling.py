import json
import math
import re
from pathlib import Path

import pytest
import reference
import torch
from transformers import AutoModel, AutoModelForPreTraining

from modeling_wsl import WSLConfig, WSLForPreTraining, WSLModel
from modeling_wsl.backbone.losses import nt_xent, reconstruction_loss, reconstruction_r2


PAPER = {}
SANE = {"position_encoding": "learned", "max_positions": [400, 60, 90], "projection": "flat"}
OURS = {"token_standardization": True, "linear_path": True, "loss_normalization": "token", "denoise": True}
LAYERWISE = {"linear_path": True, "loss_normalization": "layer", "mask_ratio": 0.1}
MATRIX = {"token_standardization": True, "latent_code": "matrix", "loss_normalization": "token", "denoise": True}
NAMES = {"paper": PAPER, "sane": SANE, "ours": OURS, "layer": LAYERWISE, "matrix": MATRIX}
VARIANTS = pytest.mark.parametrize("options", NAMES.values(), ids=NAMES)
TOKEN_CODES = pytest.mark.parametrize(
    "options", [PAPER, SANE, OURS, LAYERWISE], ids=["paper", "sane", "ours", "layer"]
)


def small_config(**options):
    sizes = {"token_size": 11, "window_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return WSLConfig(**{**sizes, "latent_size": 8, **options})


def windows(batch=3, num_tokens=8, seed=0):
    """Tokens, mask and positions; one window full, one with padding inside a token, one padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 0.05 * torch.randn(batch, num_tokens, 11, generator=generator) + 0.01
    mask = torch.ones(batch, num_tokens, 11, dtype=torch.bool)
    if batch > 1:
        mask[1, 3, 4:] = False
    if batch > 2:
        mask[2, num_tokens - 3 :] = False
    n = torch.arange(num_tokens).expand(batch, -1) + 100 * torch.arange(batch)[:, None]
    positions = torch.stack([n, n // 5, n % 5], dim=-1)
    return {"tokens": torch.where(mask, tokens, 0), "token_mask": mask, "positions": positions}


def trained(model):
    """The model with every parameter away from its special initial value (zeros, ones)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@TOKEN_CODES
def test_the_model_equals_a_plain_transformer_in_output_and_gradient(options):
    model, twin = (trained(WSLModel(small_config(**options))) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    batch = windows()
    output = model(**batch)
    latents, reconstruction = reference.autoencode(twin, **batch)
    valid = batch["token_mask"].any(-1)
    torch.testing.assert_close(output.latents[valid], latents[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.reconstruction[valid], reconstruction[valid], rtol=1e-4, atol=1e-5)

    for result in (output.reconstruction, reconstruction):
        result[batch["token_mask"]].square().mean().backward()
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m)


@VARIANTS
def test_the_halves_give_what_the_whole_gives(options):
    model = trained(WSLModel(small_config(**options)))
    batch = windows()
    output = model(**batch)
    latents = model.encode(**batch)
    attention_mask = batch["token_mask"].any(-1)
    assert torch.equal(latents, output.latents)
    reconstruction = model.decode(latents, positions=batch["positions"], attention_mask=attention_mask)
    assert torch.equal(reconstruction, output.reconstruction)


@VARIANTS
def test_eager_equals_sdpa(options):
    model = trained(WSLForPreTraining(small_config(**options)))
    batch = windows()
    outputs = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs[implementation] = model(**batch)
    for key in ("loss", "latents", "reconstruction"):
        torch.testing.assert_close(outputs["sdpa"][key], outputs["eager"][key], rtol=1e-4, atol=1e-6)


@pytest.mark.large
def test_flex_attention_equals_sdpa_without_gradients():
    model = trained(WSLModel(small_config(hidden_size=32)))
    batch = windows()
    valid = batch["token_mask"].any(-1)
    with torch.no_grad():
        expected = model(**batch)
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**batch).latents[valid], expected.latents[valid], rtol=1e-4, atol=1e-5)


@VARIANTS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padded_tokens_and_entries_change_nothing_else(options, implementation):
    model = trained(WSLForPreTraining(small_config(**options, attn_implementation=implementation)))
    batch = windows()
    clean = model(**batch, make_views=False)

    noisy = {**batch, "tokens": torch.where(batch["token_mask"], batch["tokens"], torch.nan)}
    longer = {
        "tokens": torch.cat([noisy["tokens"], torch.full((3, 4, 11), torch.inf)], dim=1),
        "token_mask": torch.cat([batch["token_mask"], torch.zeros(3, 4, 11, dtype=torch.bool)], dim=1),
        "positions": torch.cat([batch["positions"], batch["positions"][:, :4]], dim=1),
    }
    variants = [noisy] if options is SANE else [noisy, longer]  # the flat head takes no longer window, see below
    valid = batch["token_mask"].any(-1)
    for variant in variants:
        output = model(**variant, make_views=False)
        for key in ("latents", "reconstruction"):
            found = output[key][:, :8][valid]
            torch.testing.assert_close(found, clean[key][valid], rtol=1e-4, atol=1e-6)
        for key in ("loss", "loss_reconstruction", "r2"):
            torch.testing.assert_close(output[key], clean[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projection", ["pooled", "flat"])
def test_padding_does_not_reach_the_contrastive_loss(projection):
    config = small_config(projection=projection, noise_std=0.0)
    model = trained(WSLForPreTraining(config))
    batch = windows()
    short = {key: value[:, :5] for key, value in batch.items()}
    padded = {**batch, "token_mask": batch["token_mask"].clone()}
    padded["token_mask"][:, 5:] = False
    losses = [model(**inputs, make_views=True).loss_contrastive for inputs in (short, padded)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)

    empty = {key: torch.cat([value, value[:1]]) for key, value in short.items()}
    empty["token_mask"][3] = False
    torch.testing.assert_close(model(**empty, make_views=True).loss_contrastive, losses[0], rtol=1e-4, atol=1e-6)


def test_without_padding_no_attention_mask_is_made():
    model = WSLModel(small_config())
    seen = []
    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    model(windows()["tokens"])
    assert seen == [None, None]


@VARIANTS
def test_every_parameter_gets_a_gradient_in_training(options):
    model = WSLForPreTraining(small_config(**options)).train()
    model(**windows()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_the_loss_is_the_weighted_sum_of_its_parts_on_two_views():
    config = small_config(noise_std=0.2, contrastive_weight=0.3)
    model = trained(WSLForPreTraining(config)).train()
    batch = windows()
    torch.manual_seed(0)
    output = model(**batch)
    assert output.latents.shape == (6, 8, 8)
    assert output.reconstruction.shape == (6, 8, 11)
    expected = 0.7 * output.loss_reconstruction + 0.3 * output.loss_contrastive
    torch.testing.assert_close(output.loss, expected)

    torch.manual_seed(0)
    views = [batch["tokens"] * (1 + 0.2 * torch.randn(3, 8, 11)) for _ in range(2)]
    views, mask = torch.cat(views), torch.cat([batch["token_mask"]] * 2)
    torch.testing.assert_close(output.loss_reconstruction, reconstruction_loss(output.reconstruction, views, mask))
    torch.testing.assert_close(output.r2, reconstruction_r2(output.reconstruction, views, mask))
    projections = model.projection(output.latents, mask.any(-1))
    torch.testing.assert_close(output.loss_contrastive, nt_xent(projections, config.temperature))


def test_evaluation_sees_the_clean_windows_once_and_returns_the_same_keys():
    model = trained(WSLForPreTraining(small_config()))
    batch = windows()
    evaluated, trained_output = model(**batch), model.train()(**batch)
    single = model(**windows(batch=1))
    assert list(evaluated) == list(trained_output) == list(single)
    assert evaluated.loss_contrastive == 0
    assert single.loss_contrastive == 0  # one window has nothing to be told apart from
    assert evaluated.reconstruction.shape == batch["tokens"].shape
    expected = reconstruction_loss(evaluated.reconstruction, batch["tokens"], batch["token_mask"])
    torch.testing.assert_close(evaluated.loss_reconstruction, expected)
    torch.testing.assert_close(evaluated.loss, 0.95 * expected)


def test_the_global_seed_reproduces_a_training_step():
    model = WSLForPreTraining(small_config(mask_ratio=0.2)).train()
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(model(**windows()).loss)
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], model(**windows()).loss)


def pca(tokens, rank):
    mean = tokens.mean(0)
    return torch.linalg.svd(tokens - mean, full_matrices=False).Vh[:rank], mean


def test_the_linear_path_starts_at_pca():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(40, 11, generator=generator) @ torch.randn(11, 11, generator=generator)
    model = WSLModel(small_config(linear_path=True)).eval()
    components, mean = pca(tokens, 8)
    model.initialize_linear_path(components, mean)
    expected = (tokens - mean) @ components.T @ components + mean
    torch.testing.assert_close(model(tokens[None]).reconstruction[0], expected, rtol=1e-4, atol=1e-4)


def test_with_standardization_the_linear_path_starts_at_pca_of_standardized_tokens_in_the_same_budget():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(11, 11, generator=generator)
    tokens = torch.randn(40, 11, generator=generator) @ mixing * torch.logspace(-4, 1, 40)[:, None] + 0.5
    mean, std = tokens.mean(-1, keepdim=True), tokens.std(-1, keepdim=True, unbiased=False)
    standardized = (tokens - mean) / std
    model = WSLModel(small_config(token_standardization=True, linear_path=True)).eval()
    components, center = pca(standardized, 6)
    model.initialize_linear_path(components, center)
    output = model(tokens[None])
    assert output.latents.shape[-1] == 8
    torch.testing.assert_close(output.latents[0, :, -2:], torch.cat([mean, std.log()], -1), rtol=1e-4, atol=1e-4)
    expected = ((standardized - center) @ components.T @ components + center) * std + mean
    torch.testing.assert_close(output.reconstruction[0], expected, rtol=1e-3, atol=1e-4)


def test_an_untrained_linear_path_is_an_orthogonal_projection():
    model = WSLForPreTraining(WSLConfig.from_size("nano")).eval()
    tokens = torch.randn(2, 64, 230, generator=torch.Generator().manual_seed(0)) * 0.01
    # White noise keeps the share of its variance that the numbers left over can hold.
    assert abs(model(tokens).r2.item() - 126 / 230) < 0.03


def test_a_linear_path_refuses_components_of_a_wrong_shape_and_models_without_one():
    model = WSLModel(small_config(token_standardization=True, linear_path=True))
    with pytest.raises(ValueError, match=r"\[6, 11\].*\[8, 11\]"):
        model.initialize_linear_path(torch.zeros(8, 11), torch.zeros(11))
    with pytest.raises(ValueError, match="linear_path=True"):
        WSLModel(small_config()).initialize_linear_path(torch.zeros(8, 11), torch.zeros(11))


def test_a_unit_of_noise_moves_a_token_as_far_in_its_statistics_as_in_its_content():
    size, tokens = 11, 2.0 + 0.3 * torch.randn(1, 4, 11)
    model = WSLModel(small_config(token_standardization=True, linear_path=True)).eval()
    model.initialize_linear_path(torch.eye(size)[: model.config.latent_size - 2], torch.zeros(size))
    model.decoder.proj_out.weight.data.zero_()  # the PCA start: the network is silent
    latents = model.encode(tokens)
    scale = model.noise_scale(latents)
    assert (scale[..., :-2] == 1).all()
    deviations = latents[..., -1].exp()
    for index in (0, -2, -1):  # content, mean, logarithm of the deviation
        step = torch.zeros_like(latents)
        step[..., index] = 0.01 * scale[..., index]
        moved = (model.decode(latents + step) - model.decode(latents)).norm(dim=-1) / 0.01
        assert (moved <= 1.01 * deviations).all(), index
        if index != -1:  # a scale moves what is left of the token by the projection, which is shorter
            torch.testing.assert_close(moved, deviations, rtol=1e-2, atol=1e-4)
    plain = WSLModel(small_config())
    assert (plain.noise_scale(plain.encode(windows()["tokens"])) == 1).all()


@VARIANTS
def test_constant_tokens_are_reconstructed_finitely(options):
    model = WSLForPreTraining(small_config(**options)).train()
    tokens = windows()["tokens"]
    tokens[0, 0], tokens[0, 1], tokens[0, 2] = 0, 1, 1e-20
    output = model(tokens, positions=windows()["positions"])
    output.loss.backward()
    assert output.reconstruction.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(8, 11)}, r"tokens must have shape \[batch, tokens, 11\].*tokens\[None\]"),
        ({"tokens": torch.zeros(3, 8, 12)}, r"token_size=11"),
        ({"tokens": torch.zeros(3, 8, 11, dtype=torch.long)}, "tokens must be floating point"),
        ({"token_mask": torch.ones(3, 8, dtype=torch.bool)}, r"token_mask must be a bool tensor.*\[3, 8, 11\]"),
        ({"token_mask": torch.ones(3, 8, 11)}, r"token_mask must be a bool tensor.*float32"),
        ({"positions": torch.zeros(3, 7, 3, dtype=torch.long)}, r"positions must have shape \[3, 8, 3\]"),
        ({"attention_mask": torch.ones(3, 7)}, r"attention_mask must have shape \[3, 8\]"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_input_is_refused_by_name(change, message, training):
    model = WSLForPreTraining(small_config()).train(training)
    with pytest.raises(ValueError, match=message):
        model(**{**windows(), **change})


def test_the_flat_head_takes_shorter_windows_and_refuses_longer_ones():
    model = WSLForPreTraining(small_config(projection="flat")).train()
    assert model(**windows(num_tokens=5)).loss.isfinite()
    with pytest.raises(ValueError, match=r'"flat".*at most 8 tokens.*got 9'):
        model(**windows(num_tokens=9))
    assert model.eval()(**windows(num_tokens=9)).loss.isfinite()  # no views, no head


def test_one_row_of_positions_serves_every_window():
    model = trained(WSLForPreTraining(small_config(loss_normalization="layer")))
    batch = windows()
    shared = batch["positions"][:1]
    repeated = model(batch["tokens"], positions=shared.expand(3, -1, -1)).loss
    assert torch.equal(model(batch["tokens"], positions=shared).loss, repeated)
    assert model.train()(batch["tokens"], positions=shared).loss.isfinite()


@VARIANTS
def test_a_saved_model_comes_back_exactly_in_one_file_or_in_shards(options, tmp_path):
    model = trained(WSLForPreTraining(small_config(**options)))
    batch = windows()
    expected = model(**batch)
    for folder, shard_size in (("one", "5GB"), ("many", "5KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=shard_size)
        assert (tmp_path / folder / "model.safetensors.index.json").exists() == (folder == "many")
        for auto in (AutoModelForPreTraining, WSLForPreTraining):
            loaded = auto.from_pretrained(tmp_path / folder)
            assert type(loaded) is WSLForPreTraining
            assert not loaded.training
            assert torch.equal(loaded(**batch).loss, expected.loss)
        bare, info = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert type(bare) is WSLModel
        assert not info["missing_keys"]
        assert torch.equal(bare(**batch).reconstruction, expected.reconstruction)


def test_a_bare_model_opens_with_a_new_head(tmp_path):
    model = trained(WSLModel(small_config()))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("projection.") for key in info["missing_keys"])
    batch = windows()
    assert torch.equal(loaded(**batch).reconstruction, model(**batch).reconstruction)


@VARIANTS
def test_bfloat16_is_saved_loaded_and_close_to_float32(options, tmp_path):
    model = trained(WSLModel(small_config(**options)))
    batch = windows()
    expected = model(**batch).reconstruction
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    output = loaded(**batch)
    # A token's mean and standard deviation, and what they scale, are not rounded.
    standardized = options.get("token_standardization", False)
    assert output.reconstruction.dtype == (torch.float32 if standardized else torch.bfloat16)
    spread = expected[batch["token_mask"]].std()
    error = (output.reconstruction - expected)[batch["token_mask"]]
    assert error.square().mean().sqrt() < 0.05 * spread
    assert AutoModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_autocast_keeps_losses_and_statistics_in_float32():
    model = WSLForPreTraining(small_config(**OURS)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**windows())
    assert {output[key].dtype for key in ("loss", "latents", "reconstruction")} == {torch.float32}


def test_float16_and_float64_tokens_are_taken():
    model = trained(WSLForPreTraining(small_config(**OURS)))
    batch = windows()
    for dtype in (torch.float16, torch.float64):
        assert model(**{**batch, "tokens": batch["tokens"].to(dtype)}).loss.isfinite()


@VARIANTS
def test_materializing_from_the_meta_device_gives_the_same_model(options):
    model = trained(WSLForPreTraining(small_config(**options)))
    with torch.device("meta"):
        hollow = WSLForPreTraining(small_config(**options))
    hollow = hollow.to_empty(device="cpu").eval()
    hollow.load_state_dict(model.state_dict())
    assert torch.equal(hollow(**windows()).loss, model(**windows()).loss)


def test_device_map_auto_gives_the_same_model(tmp_path):
    model = trained(WSLModel(small_config(**OURS)))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map="auto")
    output = loaded(**windows())
    torch.testing.assert_close(output.latents.cpu(), model(**windows()).latents, rtol=1e-4, atol=1e-5)


@VARIANTS
def test_activation_checkpointing_changes_no_gradient(options):
    model = WSLForPreTraining(small_config(**options)).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(**windows()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def check_compiled_equals_eager(options, backend):
    torch.compiler.reset()
    options = {**options, "mask_ratio": 0.0, "noise_std": 0.0, "num_hidden_layers": 1}
    model = WSLForPreTraining(small_config(**options))
    batch = windows()
    for training in (True, False):
        model.train(training)
        expected = model(**batch)
        expected.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        output = torch.compile(model, fullgraph=True, backend=backend)(**batch)
        output.loss.backward()
        for key in expected:
            torch.testing.assert_close(output[key], expected[key], rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)
        model.zero_grad()


def test_training_and_inference_are_one_graph_each():
    # Every branch at once: the traced code is what counts here, not the kernels.
    check_compiled_equals_eager({**OURS, **SANE, "loss_normalization": "layer"}, backend="eager")


@pytest.mark.large
def test_training_and_inference_compile_to_kernels():
    check_compiled_equals_eager({**OURS, **SANE, "loss_normalization": "layer"}, backend="inductor")


def test_random_views_are_part_of_the_graph():
    torch.compiler.reset()
    model = WSLForPreTraining(small_config(num_hidden_layers=1, mask_ratio=0.1)).train()
    output = torch.compile(model, fullgraph=True, backend="eager")(**windows())
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None for p in model.parameters())


def test_initial_weights_follow_gpt2():
    model = WSLModel(WSLConfig.from_size("nano", linear_path=False))
    for stack in (model.encoder, model.decoder):
        for layer in stack.layers:
            assert math.isclose(layer.mlp.up_proj.weight.std().item(), 0.02, rel_tol=0.05)
            for module in (layer.attention.o_proj, layer.mlp.down_proj):
                assert math.isclose(module.weight.std().item(), 0.02 / math.sqrt(4), rel_tol=0.05)
            assert (layer.attention_norm.weight == 1).all()
        assert (stack.proj_in.bias == 0).all()


def test_hidden_states_and_attentions_of_both_stacks_are_returned_on_request():
    model = WSLForPreTraining(small_config(attn_implementation="eager")).eval()
    output = model(**windows(), output_hidden_states=True, output_attentions=True)
    for states in (output.hidden_states, output.decoder_hidden_states):
        assert [list(state.shape) for state in states] == [[3, 8, 16]] * 3
    for attentions in (output.attentions, output.decoder_attentions):
        assert [list(attention.shape) for attention in attentions] == [[3, 2, 8, 8]] * 2
    assert isinstance(model(**windows(), return_dict=False), tuple)


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]])
def test_lora_trains_saves_and_loads(target_modules, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = WSLForPreTraining(small_config(**OURS))
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=target_modules))
    assert 0 < adapted.get_nb_trainable_parameters()[0] < sum(p.numel() for p in base.parameters())
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted.train()(**windows()).loss.backward()
        optimizer.step()
    expected = adapted.eval()(**windows()).latents
    adapted.save_pretrained(tmp_path / "adapter")

    fresh = AutoModelForPreTraining.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**windows()).latents, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**windows()).latents, expected, rtol=1e-4, atol=1e-5)


def test_a_dummy_checkpoint_is_small_and_self_contained(tmp_path):
    WSLModel(small_config()).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 100_000
    config = json.loads((tmp_path / "config.json").read_text())
    facade = Path(tmp_path, "wsl.py").read_text()
    for entry in [*config["auto_map"].values(), *(task["impl"] for task in config["custom_pipelines"].values())]:
        name = entry.removeprefix("wsl.")
        (module,) = re.findall(rf"from \.(\w+) import [^\n]*\b{name}\b", facade)
        assert f"class {name}" in Path(tmp_path, f"{module}.py").read_text()
