"""Layer-wise normalization: fitted by `tokenize` on the training models, applied and undone by the extractor."""

import datasets
import numpy as np
import pytest
import torch
from generation_fixtures import Net, same, small_backbone, trained
from halo_reference import encode_haloed
from tokenizer_reference import tokenize_naively
from zoo_fixtures import add_model, tiny_state

from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig, TokenizeError
from datasets_scripts.window_rows import layer_statistics, merge_moments, window_moments
from modeling_wsl import WSLFeatureExtractor, open_checkpoint
from modeling_wsl.backbone.encoding import decode_haloed
from modeling_wsl.checkpoints.errors import NotTokenizableError
from modeling_wsl.generation.generate import generate
from modeling_wsl.generation.plan import plan_generation
from modeling_wsl.generation.settings import GenerationSettings
from modeling_wsl.loading import load_pipeline
from trainers.pretrain import pretrain
from trainers.pretraining.pretrain_options import PretrainOptions


STATISTICS = {"conv": [0.02, 0.3], "norm": [1.0, 1.0], "": [0.5, 2.0], "embed": [-0.1, 1.5], "head": [0.0, 0.25]}
CUTS = [{"tokenization": "dense"}, {"tokenization": "sparse"}, {"tokenization": "sparse", "position_unit": "row"}]
CONFIG = TokenizeConfig(
    tokenization="sparse",
    position_unit="row",
    token_size=16,
    window_size=24,
    validation_fraction=0.4,
    split_by="model",
    layer_normalization=True,
)


def zoo(folder, seeds=range(5)):
    """Untied networks of one architecture, each in a scale and about a mean of its own."""
    for seed in seeds:
        state = {name: t * (1 + seed) + seed if t.is_floating_point() else t for name, t in tiny_state(seed).items()}
        add_model(folder, f"net-{seed}", state)
    return folder


def weights_by_layer(path):
    """Layer name -> all its tokenized weights, float64, by the names in the file alone."""
    with open_checkpoint(path) as checkpoint:
        layers = {}
        for name, spec in checkpoint.tensors.items():
            if "running" not in name and spec.dtype == "float32":
                layers.setdefault(name.rpartition(".")[0], []).append(checkpoint.read(name).double().flatten())
        return {layer: torch.cat(parts).numpy() for layer, parts in layers.items()}


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_are_the_weights_in_units_of_their_layer_and_padding_stays_zero(cut):
    state = tiny_state(0)
    fx = WSLFeatureExtractor(token_size=16, layer_normalization=STATISTICS, **cut)
    batch = fx(state)
    del state["head.weight"]  # tied to the embedding
    tokens, mask, positions = tokenize_naively(state, cut["tokenization"], 16)
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    for token, kept, (_, layer, _), found in zip(tokens, mask, positions.tolist(), batch["tokens"], strict=True):
        mean, std = STATISTICS[layers[layer]]
        torch.testing.assert_close(found, torch.where(kept, (token - mean) / std, 0.0))
    windows = list(fx.stream(tiny_state(0), window_size=7))
    assert torch.equal(torch.cat([window["tokens"] for window in windows]), batch["tokens"])


@pytest.mark.parametrize("cut", CUTS)
def test_decoding_gives_the_weights_back_up_to_rounding(cut):
    state = {
        name: t.to(torch.bfloat16) if name.startswith("conv") else t.double() if name == "head.bias" else t
        for name, t in tiny_state(0).items()
    }
    fx = WSLFeatureExtractor(token_size=16, layer_normalization=STATISTICS, **cut)
    batch = fx(state)
    back = fx.decode(batch["tokens"], batch["manifest"])
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=1e-6)
    low = fx.decode(batch["tokens"].half(), batch["manifest"])  # as a dataset stores them
    torch.testing.assert_close(low["embed.weight"], state["embed.weight"], rtol=0, atol=4e-3)


def test_a_saved_feature_extractor_normalizes_alike(tmp_path):
    fx = WSLFeatureExtractor(token_size=16, layer_normalization={name: tuple(v) for name, v in STATISTICS.items()})
    fx.save_pretrained(tmp_path)
    loaded = WSLFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.layer_normalization == fx.layer_normalization == STATISTICS
    assert torch.equal(loaded(tiny_state(0))["tokens"], fx(tiny_state(0))["tokens"])
    WSLFeatureExtractor(token_size=16).save_pretrained(tmp_path)
    assert WSLFeatureExtractor.from_pretrained(tmp_path).layer_normalization is None


def test_a_model_with_other_layers_is_refused_by_name():
    fx = WSLFeatureExtractor(layer_normalization=STATISTICS)
    state = {**tiny_state(0), "neck.weight": torch.ones(3, 4)}
    for read in (fx, lambda source: list(fx.stream(source))):
        with pytest.raises(
            NotTokenizableError,
            match=r"has layers that the zoo .* has not: 'neck' \(the zoo has 'conv', 'norm', '', ...\)",
        ):
            read(state)
    other = WSLFeatureExtractor()(state)
    with pytest.raises(ValueError, match="The manifest: has layers .* 'neck'"):
        fx.decode(other["tokens"], other["manifest"])
    with pytest.raises(ValueError, match="Net: has layers .* 'mix', 'fc'"):
        plan_generation(fx, Net(), [trained(Net())], GenerationSettings())


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, -1.0], [float("nan"), 1.0], [1.0]])
def test_statistics_that_cannot_normalize_are_refused(values):
    with pytest.raises(ValueError, match="layer_normalization of layer 'conv' is"):
        WSLFeatureExtractor(layer_normalization={"conv": values})


def test_moments_of_windows_merge_to_those_of_all_weights():
    states = [{"a.weight": torch.randn(9, 7) * 1e-3 + 5, "b.bias": torch.full((40,), 0.1)} for _ in range(3)]
    fx = WSLFeatureExtractor("sparse", token_size=4)
    parts = [window_moments(w) for state in states for w in fx.stream(state, window_size=5, min_parameters=0)]
    mean, std = layer_statistics(merge_moments(parts))["a"]
    values = torch.cat([state["a.weight"].flatten() for state in states]).double()
    assert mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert std == pytest.approx(values.std(correction=0).item(), rel=1e-9)
    assert layer_statistics(merge_moments(parts))["b"] == [pytest.approx(0.1), 1.0]  # constant: nothing to divide by


def test_tokenize_fits_on_the_training_models_alone_and_stores_what_the_extractor_gives(tmp_path):
    config = TokenizeConfig(**{**CONFIG.settings(), "max_shard_size": "6KB"})
    models = zoo(tmp_path / "zoo")
    tokenize(models, tmp_path / "dataset", config)
    windows = datasets.load_dataset(str(tmp_path / "dataset"), "windows")
    split_of = {row["model_id"]: split for split, rows in windows.items() for row in rows}
    assert sorted(split_of) == [f"net-{seed}" for seed in range(5)]
    assert set(split_of.values()) == {"train", "validation"}
    trained_on = [weights_by_layer(models / name) for name, split in split_of.items() if split == "train"]
    fx = WSLFeatureExtractor.from_pretrained(tmp_path / "dataset")
    assert set(fx.layer_normalization) == {"conv", "norm", "", "embed", "head"}
    for layer, (mean, std) in fx.layer_normalization.items():
        values = np.concatenate([layers[layer] for layers in trained_on])
        assert mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
        assert std == pytest.approx(values.std(), rel=1e-9)
    for name in split_of:
        expected = fx(models / name)
        rows = sorted(
            (row for split in windows.values() for row in split if row["model_id"] == name),
            key=lambda row: row["window_index"],
        )
        tokens = torch.from_numpy(np.concatenate([np.array(row["tokens"], np.float16) for row in rows]))
        assert torch.equal(tokens, expected["tokens"].half())
        assert torch.equal(
            torch.tensor([count for row in rows for count in row["valid_entries"]]),
            expected["manifest"].valid_entries(),
        )
    assert "less the layer's mean" in (tmp_path / "dataset" / "README.md").read_text()


def test_a_validation_model_with_layers_of_its_own_is_refused_with_the_reason(tmp_path):
    for split_seed in range(4):
        models = zoo(tmp_path / f"zoo-{split_seed}", range(3))
        add_model(models, "odd", {**tiny_state(9), "neck.weight": torch.randn(2, 3)})
        config = TokenizeConfig(**{**CONFIG.settings(), "seed": split_seed})
        tokenize(models, tmp_path / f"dataset-{split_seed}", config)
        rows = datasets.load_dataset(str(tmp_path / f"dataset-{split_seed}"), "models")
        if "refused" in rows:
            break
    (row,) = rows["refused"]
    assert (row["model_id"], row["outcome"], row["num_windows"]) == ("odd", "other_layers", 0)
    assert row["reason"] == "has layers that no training model has, 1 in all, the first: 'neck'."


def test_a_normalized_weight_beyond_float16_ends_the_run_with_its_name(tmp_path):
    small = [{"a.weight": torch.randn(20, 20) * 1e-6} for _ in range(4)]
    for number, state in enumerate(small):
        add_model(tmp_path / "zoo", f"net-{number}", state)
    config = TokenizeConfig(**{**CONFIG.settings(), "min_parameters": 0})
    report = tokenize(tmp_path / "zoo", tmp_path / "first", config)
    assert report.refused == 0
    split = datasets.load_dataset(str(tmp_path / "first"), "models", split="validation")
    name = split[0]["model_id"]
    loud = small[int(name.removeprefix("net-"))]
    loud["a.weight"][3, 4] = 1.0
    models = tmp_path / "loud"
    for number, state in enumerate(small):
        add_model(models, f"net-{number}", state)
    with pytest.raises(ValueError, match=f"{name}: tensor 'a.weight' holds .* more than float16 .* dtype float32"):
        tokenize(models, tmp_path / "second", config)
    wide = TokenizeConfig(**{**config.settings(), "dtype": "float32"})
    assert tokenize(models, tmp_path / "third", wide).accepted == 4


def test_generation_decodes_into_weights_not_into_normalized_ones():
    backbone, anchor = small_backbone(), trained(Net())
    names = WSLFeatureExtractor(token_size=64)(anchor)["manifest"].layers
    statistics = {layer.name: [5.0 + i, 0.1] for i, layer in enumerate(names)}
    fx = WSLFeatureExtractor(token_size=64, layer_normalization=statistics)
    plan = plan_generation(fx, Net(), [anchor], GenerationSettings(bandwidth=0, halo=8, progress=False))
    (model,) = generate(backbone, plan)
    batch = fx(anchor)
    latents = encode_haloed(backbone, batch["tokens"], batch["token_mask"], batch["positions"], 64, 8)
    tokens = decode_haloed(backbone, latents, batch["positions"], 64, 8)
    assert same(model.state_dict, fx.decode(tokens, batch["manifest"]))
    normalized = WSLFeatureExtractor(token_size=64).decode(tokens, batch["manifest"])["fc.weight"]
    torch.testing.assert_close(model.state_dict["fc.weight"], normalized * 0.1 + 8.0)
    assert model.provenance["feature_extractor"]["layer_normalization"] == statistics


def test_the_sane_recipe_trains_on_such_a_zoo_and_its_backbone_embeds_and_generates(tmp_path):
    models = zoo(tmp_path / "zoo")
    config = TokenizeConfig(**{**CONFIG.settings(), "token_size": 201, "window_size": 4096})
    tokenize(models, tmp_path / "tokens", config)
    options = {"dataset": str(tmp_path / "tokens"), "output_dir": str(tmp_path / "backbone"), "max_steps": 2}
    facts = pretrain(PretrainOptions.from_yaml("sane_zoo", **options))
    assert facts["status"] == "completed"
    assert facts["model_config"]["position_encoding"] == "learned"
    embedder = load_pipeline("weight-embedding", tmp_path / "backbone", progress=False)
    dataset = WSLFeatureExtractor.from_pretrained(tmp_path / "tokens")
    assert embedder.feature_extractor.layer_normalization == dataset.layer_normalization
    assert np.isfinite(embedder(str(models / "net-0"))["embedding"]).all()
    with pytest.raises(NotTokenizableError, match="<Net>: has layers that the zoo"):
        embedder(trained(Net()))
    generator = load_pipeline("weight-generation", tmp_path / "backbone")
    state = {name: t for name, t in tiny_state(0).items() if name != "head.weight"}
    (model,) = generator(state, anchors=[str(models / "net-4")], progress=False)
    assert model.provenance["tensors"]["conv.weight"] == "sampled"


def test_the_option_needs_no_zoo_of_many_models_to_say_what_is_wrong(tmp_path):
    add_model(tmp_path / "zoo", "broken", {"a.weight": torch.full((20, 20), float("nan"))})
    with pytest.raises(TokenizeError, match="None of the 1 models was accepted"):
        tokenize(tmp_path / "zoo", tmp_path / "dataset", CONFIG)
