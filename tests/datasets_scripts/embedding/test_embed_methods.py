"""The embeddings beside a backbone's: statistics, spectral norms, projections of tokens."""

import numpy as np
import pytest
import torch
from embed_fixtures import network, write_model
from safetensors.torch import save_file

from datasets_scripts.embedding import METHODS, EmbedConfig, EmbeddingTable
from datasets_scripts.embedding.embed_models import embed_models
from datasets_scripts.embedding.linear_projection import random_projection, standardize
from hf_wsl.options import ConfigError
from modeling_wsl import WSLFeatureExtractor


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    root = tmp_path_factory.mktemp("alike")
    for seed in range(4):
        write_model(root / f"net{seed}", network(30, 12, seed=seed))
    return root


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    root = tmp_path_factory.mktemp("unlike")
    for name, widths in {"long": (40, 200), "one": (9,)}.items():
        write_model(root / name, network(*widths, seed=len(name)))
    return root


def naive_statistics(state):
    rows = []
    for tensor in state.values():
        values = tensor.double().flatten()
        quantiles = [values.quantile(q) for q in (0, 0.25, 0.5, 0.75, 1)]
        rows.append(torch.stack([values.mean(), values.var(correction=0), *quantiles]))
    return torch.stack(rows)  # [tensors, 7]


def test_statistics_are_seven_numbers_a_tensor_in_state_dict_order(alike):
    table, _ = embed_models("statistics", [alike])
    assert table.embeddings.shape == (4, 4 * 7)
    expected = naive_statistics(network(30, 12, seed=2).state_dict()).flatten()
    np.testing.assert_allclose(table.embeddings[2], expected, rtol=1e-5, atol=1e-7)


def test_statistics_of_unlike_models_are_refused_naming_the_first_that_differs(unlike):
    with pytest.raises(ValueError, match=r"one is not like long: 0.weight is \[9, 12\].* or use pooled-statistics"):
        embed_models("statistics", [unlike])


def test_pooled_statistics_are_pooled_over_matrices_and_over_other_tensors(unlike):
    table, _ = embed_models("pooled-statistics", [unlike])
    state = network(40, 200, seed=4).state_dict()
    expected = []
    for dimensions in (2, 1):
        kind = {name: tensor for name, tensor in state.items() if tensor.dim() == dimensions}
        rows = naive_statistics(kind)
        counts = torch.tensor([len(kind), sum(t.numel() for t in kind.values())]).double().log1p()
        expected.append(torch.cat([rows.mean(0), rows.std(0, correction=0), rows.amin(0), rows.amax(0), counts]))
    np.testing.assert_allclose(table.embeddings[0], torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_spectral_norms_stand_side_by_side_for_like_models_and_are_pooled_for_unlike_ones(alike, unlike):
    table, _ = embed_models("spectral-norms", [alike])
    expected = []
    for layer in network(30, 12, seed=3):
        singular = torch.linalg.svdvals(layer.weight.detach().double())
        expected += [singular[0], singular[0] / singular.norm()]
    np.testing.assert_allclose(table.embeddings[3], expected, rtol=1e-5)
    assert table.made_by["pooled_over_tensors"] == "false"
    pooled, _ = embed_models("spectral-norms", [alike / "net3", unlike])
    assert pooled.made_by["pooled_over_tensors"] == "true"
    rows = np.array(expected).reshape(2, 2)
    pools = [*rows.mean(0), *rows.std(0), *rows.min(0), *rows.max(0)]
    np.testing.assert_allclose(pooled.embeddings[0, :8], pools, rtol=1e-5)


def test_a_large_matrix_is_widened_in_parts_to_the_same_norm(tmp_path, monkeypatch):
    write_model(tmp_path / "net", network(300, seed=0))
    whole = embed_models("spectral-norms", [tmp_path / "net"])[0].embeddings
    monkeypatch.setattr("datasets_scripts.embedding.plain_methods.ENTRIES_AT_ONCE", 100)
    np.testing.assert_allclose(embed_models("spectral-norms", [tmp_path / "net"])[0].embeddings, whole, rtol=1e-6)


def test_a_random_projection_keeps_the_mean_and_spread_of_a_token_beside_its_directions(unlike):
    table, _ = embed_models("random-projection", [unlike], EmbedConfig(latent_size=20, seed=7))
    batch = WSLFeatureExtractor()(unlike / "long")
    standardized, mean, std = standardize(batch["tokens"], batch["token_mask"])
    latents = torch.cat([standardized @ random_projection(18, 230, seed=7).components.T, mean, std.log()], 1)
    np.testing.assert_allclose(table.embeddings[0], latents.mean(0), atol=1e-5)


def test_pca_sees_the_models_that_it_is_fitted_on_and_no_others(alike, unlike):
    config = EmbedConfig(latent_size=8, fit_on=[str(unlike)])
    both = embed_models("pca", [alike], config)[0].embeddings
    np.testing.assert_array_equal(embed_models("pca", [alike / "net0"], config)[0].embeddings[0], both[0])
    assert not np.allclose(embed_models("pca", [alike], EmbedConfig(latent_size=8))[0].embeddings, both, atol=1e-3)


def test_projections_pool_as_a_backbone_does(alike):
    mean, moments, layers = (
        embed_models("pca", [alike], EmbedConfig(latent_size=8, pooling=pooling, per_layer=True))[0]
        for pooling in ("mean", "moments", "layers")
    )
    assert (mean.embeddings.shape, moments.embeddings.shape, layers.embeddings.shape) == ((4, 8), (4, 24), (4, 16))
    np.testing.assert_array_equal(moments.embeddings[:, :8], mean.embeddings)
    assert list(mean.layers[0]) == ["0", "1"]
    np.testing.assert_array_equal(layers.embeddings[1].reshape(2, 8), list(mean.layers[1].values()))


def test_every_method_gives_finite_rows_for_models_of_constant_and_of_empty_tensors(tmp_path):
    model = network(30, 12, seed=0)
    model[0].weight.data.zero_()
    model.register_buffer("nothing", torch.zeros(0))
    write_model(tmp_path / "net", model)
    for method in METHODS:
        assert np.isfinite(embed_models(method, [tmp_path / "net"])[0].embeddings).all(), method


def test_options_that_a_method_does_not_have_are_refused(alike):
    with pytest.raises(ConfigError, match="per_layer: statistics has no embeddings of layers"):
        embed_models("statistics", [alike], EmbedConfig(per_layer=True))
    with pytest.raises(ConfigError, match="untrained: pca has no weights"):
        embed_models("pca", [alike], EmbedConfig(untrained=True))
    with pytest.raises(ConfigError, match="latent_size is 2; it is at least 3"):
        EmbedConfig(latent_size=2)


def test_the_first_model_that_could_be_read_is_what_others_are_compared_with(alike, tmp_path):
    state = network(9, seed=0).state_dict() | {"0.weight": torch.full((9, 12), torch.nan)}
    (tmp_path / "broken").mkdir()
    save_file(state, tmp_path / "broken" / "model.safetensors")
    for method, config in (("statistics", EmbedConfig()), ("random-projection", EmbedConfig(pooling="layers"))):
        table, refused = embed_models(method, [tmp_path / "broken", alike], config)
        assert list(refused) == ["broken"] and len(table) == 4


def test_a_kernel_of_keras_has_its_outputs_last(tmp_path):
    kernel = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    (tmp_path / "net").mkdir()
    save_file({"conv/kernel": kernel, "conv/bias": torch.zeros(6)}, tmp_path / "net" / "model.safetensors")
    found = embed_models("spectral-norms", [tmp_path / "net"])[0].embeddings[0, 0]
    assert found == pytest.approx(torch.linalg.matrix_norm(kernel.reshape(-1, 6), 2).item(), rel=1e-5)


def test_a_zoo_s_models_have_the_ids_of_its_table(tmp_path):
    for name in ("one", "two"):
        write_model(tmp_path / name / "models" / "member_0000" / "epoch_001", network(9, seed=0))
        (tmp_path / name / "properties.parquet").write_bytes(b"read by the probe")
    assert embed_models("statistics", [tmp_path / "one"])[0].model_ids == ["member_0000/epoch_001"]
    both = embed_models("statistics", [tmp_path / "one", tmp_path / "two"])[0].model_ids
    assert both == ["one/member_0000/epoch_001", "two/member_0000/epoch_001"]


def test_profile_writes_two_fingerprints_that_find_copies_beside_the_profile(alike, tmp_path):
    table, _ = embed_models("profile", [alike])
    assert table.embeddings.shape == (4, 273) and table.made_by == {"method": "profile"}
    table.write(tmp_path / "table.parquet")
    read = EmbeddingTable.read(tmp_path / "table.parquet").select(table.model_ids[::-1])
    for name in ("position", "probe"):
        rows = read.fingerprints[name]
        np.testing.assert_array_equal(rows[::-1], table.fingerprints[name])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    with pytest.raises(ConfigError, match="per_layer: profile has no embeddings of layers"):
        embed_models("profile", [alike], EmbedConfig(per_layer=True))
