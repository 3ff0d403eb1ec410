"""Copies under wrappers and in other spellings are found by every command, and what cannot be compared ends none."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from search_fixtures import new_net, train, write_model

from datasets_scripts.embedding import EmbedConfig
from datasets_scripts.embedding.embed_models import embed, embed_models
from datasets_scripts.near_copies import NearCopyItem, fingerprint, near_copy_groups
from datasets_scripts.search.compare import compare
from datasets_scripts.search.lineage import lineage_trees
from datasets_scripts.search.search import search
from datasets_scripts.search.search_config import SearchConfig
from datasets_scripts.search.weight_relations import aligned_names, compare_weights
from datasets_scripts.sources import expand_sources
from datasets_scripts.splits import SplitItem, assign_splits
from modeling_wsl import open_checkpoint
from modeling_wsl.embedding.model_embedding import embed_model
from modeling_wsl.tokens.manifest import TensorSpec


PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "some_tower.")


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """A network, copies of it under wrappers, its fine-tune under one, its cast, and two strangers."""
    folder = tmp_path_factory.mktemp("wrapped") / "models"
    base = new_net(0)
    write_model(folder / "plain", base.state_dict())
    for number, prefix in enumerate(PREFIXES):
        write_model(folder / f"copy{number}", prefixed(base.state_dict(), prefix))
    write_model(folder / "tuned", prefixed(train(base, 0, steps=60).state_dict(), "module."))
    for seed in (1, 2):
        write_model(folder / f"stranger{seed}", prefixed(new_net(seed, scale=2).state_dict(), "model."))
    return folder


def groups_found(table, tmp_path, **options):
    output = tmp_path / "groups.json"
    search(table, None, SearchConfig(duplicates=True, output_file=str(output), **options))
    return [{copy["model_id"]: copy["verdict"] for copy in group} for group in json.loads(output.read_text())]


def test_copies_under_wrappers_are_one_group_and_exact(wrapped, tmp_path):
    embed("profile", [wrapped], tmp_path / "table.parquet")
    (group,) = groups_found(tmp_path / "table.parquet", tmp_path, models=[str(wrapped)])
    copies = {f"copy{i}": "same weights" for i in range(len(PREFIXES))}
    assert group == {"plain": "same weights", "tuned": "fine-tune", **copies}


def test_the_tree_of_a_family_does_not_depend_on_wrappers(wrapped):
    (tree,) = lineage_trees(expand_sources([wrapped]))
    assert len(tree.edges) == len(PREFIXES) + 1 and tree.tensors == 6
    assert {edge.distance for edge in tree.edges if edge.child != "tuned"} == {0.0}


@pytest.mark.parametrize("method", ["statistics", "pooled-statistics", "random-projection", "profile"])
def test_a_network_embeds_the_same_under_every_wrapper(wrapped, method):
    sources = [wrapped / "plain", *(wrapped / f"copy{number}" for number in range(len(PREFIXES)))]
    table, refused = embed_models(method, sources)
    assert not refused
    assert (table.embeddings == table.embeddings[0]).all()


def mixture(form):
    torch.manual_seed(0)
    up, down = torch.randn(8, 20, 12), torch.randn(8, 12, 20)
    norm = {"layers.0.norm.weight": torch.ones(12), "layers.0.mlp.gate.weight": torch.randn(8, 12)}
    at = "layers.0.mlp.experts"
    if form == "split":
        return norm | {
            f"{at}.{e}.{n}.weight": w[e].clone() for e in range(8) for n, w in (("up_proj", up), ("down_proj", down))
        }
    turn = form == "turned"
    return norm | {f"{at}.{n}": w.mT.contiguous() if turn else w for n, w in (("up_proj", up), ("down_proj", down))}


@pytest.mark.parametrize("method", ["statistics", "spectral-norms", "random-projection", "profile"])
def test_experts_embed_the_same_however_they_are_stored(tmp_path, method):
    for form in ("split", "stacked", "turned"):
        write_model(tmp_path / form, mixture(form))
    table, _ = embed_models(method, [tmp_path])
    assert (table.embeddings == table.embeddings[0]).all()
    assert np.array_equal(embed_model(mixture("split")).position, embed_model(mixture("turned")).position)
    for form in ("stacked", "turned"):
        assert compare(tmp_path / "split", tmp_path / form).verdict == "same weights"


def adapter(folder, change=None, seed=0):
    torch.manual_seed(seed)
    state = {}
    for layer in range(4):
        a, b = torch.randn(4, 32), torch.randn(16, 4)
        if change is not None:
            a, b = change @ a, b @ change.inverse()
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        state |= {f"{at}.lora_A.weight": a.contiguous(), f"{at}.lora_B.weight": b.contiguous()}
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "peft_type": "LORA"}')


def test_two_factorizations_of_an_adapter_are_near_and_another_adapter_is_not(tmp_path):
    adapter(tmp_path / "one")
    adapter(tmp_path / "refactored", torch.randn(4, 4) + 3 * torch.eye(4))
    adapter(tmp_path / "other", seed=1)
    assert compare(tmp_path / "one", tmp_path / "refactored").verdict == "copy"
    assert compare(tmp_path / "one", tmp_path / "other").verdict == "same architecture only"
    table, _ = embed_models("pooled-statistics", [tmp_path])
    rows = dict(zip(table.model_ids, table.embeddings, strict=True))
    np.testing.assert_allclose(rows["one"], rows["refactored"], rtol=1e-3, atol=1e-4)
    (tree,) = lineage_trees(expand_sources([tmp_path]))
    assert {tree.root, *(edge.child for edge in tree.edges)} == {"one", "refactored"}


def test_casts_are_near_copies_even_where_all_weights_are_denormal(tmp_path):
    torch.manual_seed(0)
    state = {f"{i}.weight": torch.randn(40, 40) * 2e-7 for i in range(3)}  # in float16, steps of 6e-8
    write_model(tmp_path / "float32", state)
    write_model(tmp_path / "float16", {name: value.half() for name, value in state.items()})
    tiny = {name: value * 1e-34 for name, value in state.items()}  # denormal in float32 too
    write_model(tmp_path / "tiny", tiny)
    write_model(tmp_path / "tiny64", {name: value.double() for name, value in tiny.items()})
    # A fifth of each weight is rounded away, to steps that leave few values.
    assert compare(tmp_path / "float32", tmp_path / "float16").verdict == "quantized copy"
    assert compare(tmp_path / "tiny", tmp_path / "tiny64").verdict == "same weights"
    items = [NearCopyItem(str(i), fingerprint(open_checkpoint(s))) for i, s in enumerate((state, tiny))]
    assert len(set(near_copy_groups(items))) == 1


def test_a_model_that_cannot_be_compared_is_a_verdict_and_the_others_go_on(wrapped, tmp_path):
    folder = tmp_path / "models"
    for name in ("plain", "copy0"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes((wrapped / name / "model.safetensors").read_bytes())
    write_model(folder / "broken", new_net(0).state_dict())
    embed("profile", [folder], tmp_path / "table.parquet")
    broken = folder / "broken" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:200])
    (group,) = groups_found(tmp_path / "table.parquet", tmp_path, models=[str(folder)])
    assert group["plain"] == group["copy0"] == "same weights" or group["plain"].startswith("not comparable")
    assert group["broken"].startswith("not comparable: ")
    (tree,) = lineage_trees(expand_sources([folder]))
    assert {tree.root, *(edge.child for edge in tree.edges)} == {"plain", "copy0"}


def test_models_whose_heads_differ_are_compared_by_the_backbone_they_share():
    torch.manual_seed(0)
    body = {f"encoder.{i}.weight": torch.randn(9, 9) for i in range(4)} | {"embed.weight": torch.randn(5, 9)}
    tuned = {f"vit.{name}": value + 0.01 for name, value in body.items()} | {"classifier.weight": torch.randn(3, 9)}
    comparison = compare_weights([open_checkpoint(body), open_checkpoint(tuned)])
    assert comparison.tensors == 5
    assert comparison.distances[0, 1] == pytest.approx(0.01 * (4 * 81 + 45) ** 0.5, rel=1e-3)
    specs = {name: TensorSpec.of(name, value) for name, value in body.items()}
    assert aligned_names(specs, {"vit." + n: TensorSpec("vit." + n, s.shape, s.dtype) for n, s in specs.items()}) == {
        name: f"vit.{name}" for name in body
    }


def test_a_network_too_small_for_a_fingerprint_is_not_divided_from_its_wrapped_copy():
    items = [SplitItem(str(i), None, f"hash{i}", 10, str(i), "same" if i < 2 else str(i)) for i in range(6)]
    for seed in range(8):
        splits = assign_splits(items, split_by="model", validation_fraction=0.5, seed=seed)
        assert splits[0] == splits[1]


def test_a_pca_fitted_on_wrapped_copies_is_that_of_the_plain_network(wrapped):
    rows = [
        embed_models("pca", [wrapped / name], EmbedConfig(latent_size=6))[0].embeddings for name in ("plain", "copy1")
    ]
    assert np.array_equal(*rows)
