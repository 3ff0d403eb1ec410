"""`embed` by a backbone: shared batches, poolings, layers, fresh weights, and which models its rows are of."""

import numpy as np
import pytest
import torch
from embed_fixtures import network, write_model
from halo_reference import encode_haloed
from safetensors.torch import save

from datasets_scripts.embedding import EmbedConfig, EmbeddingTable, embed
from datasets_scripts.embedding.embed_models import embed_models
from datasets_scripts.embedding.packed_encoding import PackedEncoder
from modeling_wsl import WSLConfig, WSLFeatureExtractor, WSLModel, open_checkpoint
from modeling_wsl.loading import load_pipeline


HALO = 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = WSLConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, latent_size=16, window_size=8, linear_path=True
    )
    model = WSLModel(config)
    with torch.no_grad():  # at its start the deep path is silent, and what shares a batch could not matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    WSLFeatureExtractor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(backbone):
    return load_pipeline("weight-embedding", backbone, progress=False, device="cpu")


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """Models of many windows, of one token, and of two lengths between."""
    root = tmp_path_factory.mktemp("unlike")
    for name, widths in {"long": (40, 200), "one": (9,), "short": (30, 12, 8), "two": (20, 20)}.items():
        write_model(root / name, network(*widths, seed=len(name)))
    return root


def test_models_that_share_batches_are_embedded_as_each_alone(backbone, pipeline, unlike):
    for batch_size in (1, 3):
        table, refused = embed_models(backbone, [unlike], EmbedConfig(halo=HALO, batch_size=batch_size))
        assert (table.model_ids, refused) == (["long", "one", "short", "two"], {})
        for name, embedding in zip(table.model_ids, table.embeddings, strict=True):
            alone = pipeline(str(unlike / name), halo=HALO)["embedding"]
            np.testing.assert_allclose(embedding, alone, atol=2e-6)


def test_a_forward_pass_takes_many_short_models_but_no_more_tokens_than_its_windows_hold(backbone):
    encoder, seen = PackedEncoder(backbone, EmbedConfig(halo=1, batch_size=2)), []
    encoder.embedder.model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    for seed in range(9):
        checkpoint = open_checkpoint(network(30, 12, seed=seed))
        encoder.add(f"net{seed}", checkpoint, encoder.extractor.manifest(checkpoint), lambda tokens: None)
    assert len(encoder.finish()) == 9
    assert sorted(rows for rows, _ in seen) == [4, 5]
    assert {length for _, length in seen} == {4}


def test_moments_are_those_of_all_latents(backbone, pipeline, unlike):
    table, _ = embed_models(backbone, [unlike], EmbedConfig(pooling="moments", halo=HALO))
    for name, found in zip(table.model_ids, table.embeddings, strict=True):
        batch = pipeline.feature_extractor(unlike / name)
        fields = [batch[field] for field in ("tokens", "token_mask", "positions")]
        latents = encode_haloed(pipeline.model, *fields, window_size=8, halo=HALO).double()
        mean, std = latents.mean(0), latents.std(0, correction=0)
        skewness = ((latents - mean) ** 3).mean(0) / std**3 if len(latents) > 1 else torch.zeros(16)
        np.testing.assert_allclose(found, torch.cat([mean, std, skewness]), atol=1e-4)


def test_layers_have_embeddings_of_their_own_in_the_table(backbone, pipeline, unlike, tmp_path):
    embed(backbone, [unlike], tmp_path / "table.parquet", EmbedConfig(per_layer=True, halo=HALO))
    layers = EmbeddingTable.read(tmp_path / "table.parquet").layers
    expected = pipeline(str(unlike / "short"), halo=HALO)["per_layer"]
    assert [list(row) for row in layers] == [["0", "1"], ["0"], ["0", "1", "2"], ["0", "1"]]
    for name, mean in expected.items():
        np.testing.assert_allclose(layers[2][name], mean, atol=2e-6)


def test_layers_side_by_side_need_models_of_one_architecture(backbone, pipeline, unlike, tmp_path):
    for seed in range(2):
        write_model(tmp_path / "alike" / f"net{seed}", network(30, 12, seed=seed))
    table, _ = embed_models(backbone, [tmp_path / "alike"], EmbedConfig(pooling="layers"))
    expected = pipeline(str(tmp_path / "alike" / "net1"))["per_layer"]
    np.testing.assert_allclose(table.embeddings[1], np.concatenate(list(expected.values())), atol=2e-6)
    with pytest.raises(ValueError, match=r"one is not like long: 0.weight is \[9, 12\] there and \[40, 12\] here"):
        embed_models(backbone, [unlike], EmbedConfig(pooling="layers"))


def test_an_untrained_backbone_is_drawn_anew_from_the_seed_its_linear_path_too(backbone, unlike):
    first, again, other = (
        PackedEncoder(backbone, EmbedConfig(untrained=True, seed=seed)).embedder.model.state_dict()
        for seed in (0, 0, 1)
    )
    for name in ("linear_encoder.weight", "encoder.proj_in.weight", "encoder.proj_out.weight"):
        assert torch.equal(first[name], again[name])
        assert not torch.allclose(first[name], other[name], atol=1e-3)
    table, _ = embed_models(backbone, [unlike], EmbedConfig(untrained=True, seed=1))
    assert not np.allclose(table.embeddings, embed_models(backbone, [unlike])[0].embeddings, atol=1e-3)
    assert (table.made_by["untrained"], table.made_by["seed"]) == ("True", "1")


def test_the_same_models_and_seed_give_the_same_bytes(backbone, unlike, tmp_path):
    for name in ("a", "b"):
        embed(backbone, [unlike], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_pinned_model_of_the_hub_is_read_at_its_revision(backbone, hub, tmp_path):
    commit = hub.add("ada/net", {"model.safetensors": save({"weight": torch.ones(4, 5)})})
    hub.repositories["ada/net"].revisions["v1"] = commit
    table, refused = embed_models(backbone, ["ada/net@v1"])
    assert (table.model_ids, table.revisions, refused) == (["ada/net"], [commit], {})
    assert any("/revision/v1" in request for request in hub.requests)
    with pytest.raises(ValueError, match="has no revision 'v2'"):
        embed(backbone, ["ada/net@v2"], tmp_path / "other.parquet")
    assert not (tmp_path / "other.parquet").exists()


def test_a_model_that_turns_out_unreadable_halfway_leaves_nothing_behind(backbone, pipeline, tmp_path):
    broken = network(600, 2000, seed=0)  # more than one piece of the stream
    broken[-1].bias.data[-1] = torch.nan
    write_model(tmp_path / "models" / "broken", broken)
    write_model(tmp_path / "models" / "sound", network(30, 12, seed=1))
    table, refused = embed_models(backbone, [tmp_path / "models"], EmbedConfig(batch_size=10_000))
    assert table.model_ids == ["sound"] and "holds nan" in refused["broken"]
    alone = pipeline(str(tmp_path / "models" / "sound"))["embedding"]
    np.testing.assert_allclose(table.embeddings[0], alone, atol=2e-6)


def test_a_model_without_tokens_is_left_out_with_the_reason(backbone, tmp_path):
    for name, tensors in (("full", {"weight": torch.ones(4)}), ("empty", {"n.running_mean": torch.ones(3)})):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / "model.safetensors").write_bytes(save({**tensors, "n.running_var": torch.ones(3)}))
    for method in (backbone, "statistics", "random-projection"):
        report = embed(method, [tmp_path / "zoo"], tmp_path / "table.parquet")
        assert report.rows == 1 and "no weights to tokenize" in report.refused["empty"]
        assert EmbeddingTable.read(tmp_path / "table.parquet").model_ids == ["full"]
