"""Weights -> tokens -> weights: bit for bit, for every architecture that the paper generates and then some."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from tokenizer_reference import tokenize_naively
from transformers import AutoFeatureExtractor

from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel, open_checkpoint
from modeling_wsl.backbone import window_inputs


# The paper's 25 architectures (appendix C.1), by the names that timm has for them.
PAPER_ARCHITECTURES = [
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "densenet121",
    "tf_efficientnetv2_s",
    "tf_efficientnetv2_m",
    "tf_mobilenetv3_small_100",
    "tf_mobilenetv3_small_075",
    "mobilenetv2_100",
    "tiny_vit_5m_224",
    "tiny_vit_11m_224",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit3_base_patch16_224",
    "deit3_medium_patch16_224",
    "beitv2_base_patch16_224",
    "swin_s3_tiny_224",
    "swin_s3_small_224",
    "swin_s3_base_224",
]
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def random_state(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a model built on the meta device, filled with noise: cheaper than initializing it."""
    generator = torch.Generator().manual_seed(seed)
    # One draw for all, views of it per tensor: bits differ everywhere, and the test costs memory speed.
    noise = torch.randn(1 << 20, generator=generator)
    state, tensors = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in tensors:  # tied parameters stay one tensor
            repeats = -(-max(tensor.numel(), 1) // len(noise))
            values = noise.repeat(repeats)[: tensor.numel()].reshape(tensor.shape)
            tensors[id(tensor)] = (
                values.to(tensor.dtype) if tensor.is_floating_point() else torch.ones_like(values).long()
            )
        state[name] = tensors[id(tensor)]
    return state


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes; unlike `torch.equal`, tells -0 from 0 and one NaN from another."""
    flat = (a.contiguous().reshape(-1), b.contiguous().reshape(-1))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(t.view(torch.uint8) for t in flat))


def assert_round_trip(fx: WSLFeatureExtractor, source, state: dict[str, torch.Tensor]) -> None:
    features = fx(source)
    back = fx.decode(features["tokens"], features["manifest"])
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert same_bits(back[name], tensor), name


# As their smaller kin, and up to 10 s each.
LARGE = ("resnet101", "resnet152", "convnext_small", "convnext_base", "tf_efficientnetv2_m", "deit3_base_patch16_224")
LARGE += ("swin_s3_small_224", "swin_s3_base_224")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.large if name in LARGE else ()) for name in PAPER_ARCHITECTURES]
)
def test_every_architecture_of_the_paper_comes_back_bit_for_bit(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    state = random_state(model)
    fx = WSLFeatureExtractor()
    assert_round_trip(fx, state, state)
    manifest = fx.manifest(state)
    assert manifest.num_parameters == sum(p.numel() for p in model.parameters())
    if name == "vit_base_patch16_224":
        assert manifest.padding < 0.0005


def transformers_model(family: str) -> torch.nn.Module:
    import transformers as t

    clip_text = {**SMALL, "vocab_size": 99, "projection_dim": 32}
    clip_vision = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 32}
    whisper = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 99}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    models = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=99)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL, vocab_size=99)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SMALL, image_size=32, patch_size=8)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=clip_text, vision_config=clip_vision, projection_dim=32)),
        "whisper": lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**whisper, **heads, **tokens)),
        "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=99)),
    }
    return models[family]()


@pytest.mark.parametrize("tokenization", ["dense", "sparse"])
@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "clip", "whisper", "mamba"])
def test_transformers_models_come_back_bit_for_bit_with_tied_tensors_stored_once(family, tokenization):
    model = transformers_model(family)
    fx = WSLFeatureExtractor(tokenization=tokenization, token_size=48)
    state = model.state_dict()
    assert_round_trip(fx, model, state)
    manifest = fx.manifest(model)
    tokenized = {spec.name for layer in manifest.layers for spec in layer.tensors}
    assert {name for name, _ in model.named_parameters()} <= tokenized | set(manifest.tied)
    features = fx(model)
    back = fx.decode(features["tokens"], features["manifest"])
    for alias, name in manifest.tied.items():
        assert back[alias] is back[name]
    if family in ("gpt2", "bert", "mamba"):
        assert manifest.tied


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_of_a_dtype_survives(dtype):
    if dtype.itemsize <= 2:  # all bit patterns that are finite
        integer = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
        values = torch.arange(2 ** (8 * dtype.itemsize)).to(integer).view(dtype)
        values = values[torch.isfinite(values.float())]
    else:
        extremes = torch.finfo(dtype)
        values = torch.tensor([extremes.max, extremes.min, extremes.tiny, -0.0, 0.0, 1 / 3], dtype=dtype)
    state = {"layer.weight": values, "layer.scale": values[-1].clone()}
    fx = WSLFeatureExtractor(token_size=7)
    assert_round_trip(fx, state, state)


def test_dtypes_may_differ_within_a_model():
    state = {f"l.{i}": torch.randn(5).to(dtype) for i, dtype in enumerate(DTYPES)}
    state |= {"l.count": torch.arange(3), "l.flag": torch.tensor([True, False])}
    features = WSLFeatureExtractor(token_size=4)(state)
    assert features["tokens"].dtype == torch.float64
    assert_round_trip(WSLFeatureExtractor(token_size=4), state, state)


def awkward_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "cls_token": noise(1, 1, 50),
        "logit_scale": noise(()),
        "conv.weight": noise(7, 3, 3, 3),
        "conv.bias": noise(7),
        "bn.weight": noise(7),
        "bn.bias": noise(7),
        "bn.running_mean": noise(7),
        "bn.running_var": noise(7),
        "bn.num_batches_tracked": torch.tensor(3),
        "transposed.weight": noise(5, 9, 2, 2),
        "transposed.bias": noise(9),
        "view.weight": noise(9, 100).t(),
        "view.bias": noise(100),
        "conv1d.weight": noise(4, 12),
        "conv1d.bias": noise(12),
        "norm.parametrizations.weight.original0": noise(6, 1),
        "norm.parametrizations.weight.original1": noise(6, 4),
        "norm.bias": noise(6),
        "blocks.0.gamma_1": noise(11),
        "blocks.0.attn.q_bias": noise(11),
        "empty.weight": noise(0, 4),
    }


@pytest.mark.parametrize("tokenization", ["dense", "sparse"])
def test_tokens_equal_a_naive_reference(tokenization):
    state = awkward_state()
    fx = WSLFeatureExtractor(tokenization=tokenization, token_size=8)
    features = fx(state)
    tokens, mask, positions = tokenize_naively(state, tokenization, 8)
    assert torch.equal(features["tokens"], tokens)
    assert torch.equal(features["token_mask"], mask)
    assert torch.equal(features["positions"], positions)
    assert_round_trip(fx, state, state)


@pytest.mark.parametrize("tokenization", ["dense", "sparse"])
@pytest.mark.parametrize("window_size", [1, 3, 16, 10_000])
def test_a_stream_of_windows_is_the_whole_in_pieces(tokenization, window_size, tmp_path):
    state = {name: tensor.contiguous() for name, tensor in awkward_state().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"tensor_order": str(list(state)).replace("'", '"')})
    fx = WSLFeatureExtractor(tokenization=tokenization, token_size=8)
    whole = fx(state)
    windows = list(fx.stream(tmp_path / "model.safetensors", window_size=window_size))
    for key in ("tokens", "token_mask", "positions"):
        assert torch.equal(torch.cat([window[key] for window in windows]), whole[key]), key
    assert [window["token_start"] for window in windows] == list(range(0, len(whole["tokens"]), window_size))
    assert all(len(window["tokens"]) <= window_size for window in windows)


def test_padding_is_ignored_by_decode():
    state = awkward_state()
    fx = WSLFeatureExtractor(token_size=8)
    features = fx(state)
    dirty = torch.where(features["token_mask"], features["tokens"], torch.inf)
    back = fx.decode(dirty, features["manifest"])
    assert all(same_bits(back[name], tensor) for name, tensor in state.items())


def test_decoded_tensors_do_not_share_memory_with_the_tokens():
    fx = WSLFeatureExtractor(token_size=8)
    features = fx(awkward_state())
    back = fx.decode(features["tokens"], features["manifest"])
    features["tokens"].zero_()
    assert back["conv.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", ["bn.running_var", "logit_scale"])
def test_nan_is_refused_in_carried_and_in_single_values_too(name):
    state = awkward_state()
    state[name] = torch.full_like(state[name], torch.inf)
    with pytest.raises(ValueError, match=name):
        WSLFeatureExtractor(token_size=8)(state)


def test_nan_is_refused_by_the_name_of_its_tensor_unless_admitted():
    state = awkward_state()
    state["conv.weight"][2, 1, 0, 0] = torch.nan
    fx = WSLFeatureExtractor(token_size=8)
    with pytest.raises(ValueError, match="conv.weight"):
        fx(state)
    with pytest.raises(ValueError, match="conv.weight"):
        list(fx.stream(state, window_size=4))
    features = fx(state, allow_nonfinite=True)
    back = fx.decode(features["tokens"], features["manifest"])
    assert same_bits(back["conv.weight"], state["conv.weight"])


def test_a_manifest_without_its_carried_tensors_says_so():
    fx = WSLFeatureExtractor(token_size=8)
    state = awkward_state()
    features = fx(state)
    manifest = type(features["manifest"]).from_json(features["manifest"].to_json())
    with pytest.raises(ValueError, match="bn.running_mean.*carried={}"):
        fx.decode(features["tokens"], manifest)
    without = fx.decode(features["tokens"], manifest, carried={})
    assert set(state) - set(without) == {spec.name for spec in manifest.carried}


def test_tokens_of_another_model_are_refused_with_both_shapes():
    fx = WSLFeatureExtractor(token_size=8)
    features = fx(awkward_state())
    with pytest.raises(ValueError, match=r"\(3, 8\).*manifest describes"):
        fx.decode(features["tokens"][:3], features["manifest"])


def test_settings_survive_saving_and_loading(tmp_path):
    fx = WSLFeatureExtractor("sparse", token_size=288, position_unit="row", batch_norm_statistics="tokenize")
    fx.save_pretrained(tmp_path)
    for loaded in (WSLFeatureExtractor.from_pretrained(tmp_path), AutoFeatureExtractor.from_pretrained(tmp_path)):
        assert isinstance(loaded, WSLFeatureExtractor)
        assert loaded.to_dict() == fx.to_dict()


def test_an_open_checkpoint_is_a_source_too():
    state = awkward_state()
    with open_checkpoint(state) as checkpoint:
        features = WSLFeatureExtractor(token_size=8)(checkpoint)
    assert torch.equal(features["tokens"], WSLFeatureExtractor(token_size=8)(state)["tokens"])


def test_an_unknown_option_is_refused_with_a_suggestion_and_what_a_newer_file_brings_is_not(tmp_path):
    with pytest.raises(TypeError, match="WSLFeatureExtractor has no option 'token_sise'; did you mean 'token_size'"):
        WSLFeatureExtractor(token_sise=16)
    with pytest.raises(TypeError, match=r"open_checkpoint\(\) has no option 'revison'; did you mean 'revision'"):
        WSLFeatureExtractor()({"w": torch.ones(3)}, revison="main")
    options = WSLFeatureExtractor(token_size=16).to_dict()
    assert WSLFeatureExtractor(**options, processor_class=None).token_size == 16
    newer = {**options, "option_of_a_newer_version": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(newer))
    for extractor in (
        WSLFeatureExtractor.from_dict(newer),
        WSLFeatureExtractor.from_json_file(tmp_path / "preprocessor_config.json"),
        AutoFeatureExtractor.from_pretrained(tmp_path),
    ):
        assert (extractor.token_size, extractor.option_of_a_newer_version) == (16, 3)
        assert "_from_file" not in extractor.to_dict()


TWO_LAYERS = {"a.weight": torch.arange(1.0, 12).view(11, 1), "b.weight": torch.arange(1.0, 8)}


def test_return_tensors_makes_a_batch_of_one_for_the_model():
    fx = WSLFeatureExtractor(token_size=4)
    batch, whole = fx(TWO_LAYERS, return_tensors="pt"), fx(TWO_LAYERS)
    assert list(batch) == ["tokens", "token_mask", "positions"]
    assert all(torch.equal(batch[name], whole[name][None]) for name in batch)
    assert [manifest.num_tokens for manifest in batch.manifests] == [5]
    with pytest.raises(ValueError, match="return_tensors='np'"):
        fx(TWO_LAYERS, return_tensors="np")


def test_a_list_of_sources_is_a_padded_batch_and_padding_changes_no_latents():
    fx = WSLFeatureExtractor(token_size=4)
    config = WSLConfig(
        token_size=4, latent_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, window_size=8
    )
    model = WSLModel(config).eval()
    short = {"a.weight": TWO_LAYERS["a.weight"]}
    batch = fx([TWO_LAYERS, short])
    assert batch["tokens"].shape == (2, 5, 4) and not batch["token_mask"][1, 3:].any()
    with torch.no_grad():
        both = model(**batch).latents
        for row, source in zip(both, (TWO_LAYERS, short), strict=True):
            alone = model(**fx(source, return_tensors="pt")).latents[0]
            torch.testing.assert_close(row[: len(alone)], alone)
    with pytest.raises(ValueError, match="empty"):
        fx([])


def test_tokens_of_several_layers_without_positions_warn_once(caplog):
    window_inputs.logger.warning_once.cache_clear()
    fx = WSLFeatureExtractor(token_size=4)
    config = WSLConfig(token_size=4, latent_size=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = WSLModel(config).eval()
    with torch.no_grad():
        both = fx(TWO_LAYERS, return_tensors="pt")
        model(**both)
        one_layer = fx({"a.weight": TWO_LAYERS["a.weight"]}, return_tensors="pt")
        model(one_layer["tokens"], one_layer["token_mask"])
        assert "without positions" not in caplog.text
        model(both["tokens"])
        model.encode(both["tokens"], both["token_mask"])
    assert caplog.text.count("without positions") == 1
