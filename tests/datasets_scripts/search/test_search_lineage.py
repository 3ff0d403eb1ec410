"""Lineage: distances of weights, and the tree over models of one origin."""

import json

import numpy as np
import pytest
import torch
from command_line import hf_wsl
from safetensors.torch import load_file
from scipy.stats import kurtosis
from search_fixtures import TREE, write_family, write_model

from datasets_scripts.embedding import embed
from datasets_scripts.search import weight_relations
from datasets_scripts.search.lineage import lineage_trees
from datasets_scripts.search.weight_relations import compare_weights
from datasets_scripts.sources import expand_sources
from modeling_wsl import open_checkpoint


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family") / "models")


def test_distances_are_those_of_whole_state_dicts_and_are_read_in_pieces(family, monkeypatch):
    monkeypatch.setattr(weight_relations, "PIECE_ENTRIES", 100)
    states = [load_file(path / "model.safetensors") for path in sorted(family.iterdir()) if len(path.name) > 3]
    comparison = compare_weights([open_checkpoint(state) for state in states])
    flat = torch.stack([torch.cat([t.double().flatten() for t in state.values()]) for state in states]).numpy()
    np.testing.assert_allclose(
        comparison.distances, np.linalg.norm(flat[:, None] - flat, axis=-1), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(comparison.norms, np.linalg.norm(flat, axis=1))
    expected = [np.mean([kurtosis(t.flatten(), fisher=False) for t in s.values() if t.dim() > 1]) for s in states]
    np.testing.assert_allclose(comparison.kurtosis, expected, rtol=1e-4)
    assert comparison.tensors == 6 and comparison.entries == flat.shape[1]


def test_only_tensors_that_all_models_have_are_compared():
    shared = torch.randn(8, 8)
    a = {"body": shared, "head": torch.ones(3, 8), "n.running_mean": torch.ones(8), "n.running_var": torch.ones(8)}
    b = {**a, "body": shared + 1, "head": torch.ones(4, 8), "n.running_mean": torch.zeros(8)}
    comparison = compare_weights([open_checkpoint(a), open_checkpoint(b)])
    assert (comparison.tensors, comparison.entries) == (1, 64)
    assert comparison.distances[0, 1] == pytest.approx(8)
    with pytest.raises(ValueError, match="share no tensor"):
        compare_weights([open_checkpoint(a), open_checkpoint({"other": shared})])


def test_the_tree_of_fine_tunes_is_found_and_strangers_are_left_out(family):
    (tree,) = lineage_trees(expand_sources([family]))
    assert tree.root == "root"
    assert {edge.child: edge.parent for edge in tree.edges} == TREE
    assert tree.agreement > 0.8 and tree.margin > 0
    assert all(0 < edge.distance < 1 and edge.stated is None for edge in tree.edges)


def test_the_command_prints_the_tree(family, tmp_path):
    table, output = tmp_path / "table.parquet", tmp_path / "trees.json"
    embed("pooled-statistics", [family], table)
    options = ["--lineage", "--models", str(family), "--output_file", str(output)]
    result = hf_wsl("search", table, *options)
    lines = result.output.splitlines()
    assert lines[0].startswith("root  (root: ") and sum("─ " in line for line in lines) == len(TREE)
    assert next(line for line in lines if "b11" in line).startswith(("   ", "│  "))
    (tree,) = json.loads(output.read_text())
    assert {edge["child"]: edge["parent"] for edge in tree["edges"]} == TREE


def test_models_of_no_common_origin_have_no_tree(family):
    assert lineage_trees([m for m in expand_sources([family]) if m.model_id in ("root", "stranger-1")]) == []


def test_exact_copies_hang_on_each_other(family, tmp_path):
    for name in ("one", "two", "three"):
        write_model(tmp_path / name, load_file(family / "root" / "model.safetensors"))
    (tree,) = lineage_trees(expand_sources([tmp_path]))
    assert len(tree.edges) == 2 and all(edge.distance < 1e-9 for edge in tree.edges)
    assert tree.agreement == 0.5 and tree.margin == 0


def test_a_tree_says_whether_it_is_what_a_zoo_states(family, tmp_path):
    parents, children = tmp_path / "parents", tmp_path / "children"
    for zoo, member, source, parent in (
        (parents, "member_0000", "root", None),
        (parents, "member_0001", "c", None),
        (children, "member_0000", "a", "member_0000/epoch_001"),
        (children, "member_0001", "b", "member_0001/epoch_001"),  # a wrong statement
    ):
        folder = write_model(zoo / "models" / member / "epoch_001", load_file(family / source / "model.safetensors"))
        (folder / "properties.json").write_text(json.dumps({"member": member, "parent": parent}))
    (parents / "settings.json").write_text(json.dumps({"parents": ""}))
    (children / "settings.json").write_text(json.dumps({"parents": str(parents)}))
    listed = [
        {"source": f"{zoo}/models/{member}/epoch_001", "model_id": f"{zoo}-{member}"}
        for zoo in ("parents", "children")
        for member in ("member_0000", "member_0001")
    ]
    (tmp_path / "models.json").write_text(json.dumps(listed))
    (tree,) = lineage_trees(expand_sources([tmp_path / "models.json"]))
    assert tree.root == "parents-member_0000"
    said = {edge.child: edge.stated for edge in tree.edges}
    assert said == {"children-member_0000": True, "children-member_0001": False, "parents-member_0001": None}
    assert sum("as it states" in line for line in tree.lines()) == 1


def test_siblings_that_drifted_the_same_way_hang_on_their_parent(tmp_path):
    draw = torch.Generator().manual_seed(0)

    def step(size, power=3):  # few weights change much: kurtosis grows
        return {f"{i}.weight": size * torch.randn(40, 40, generator=draw) ** power for i in range(4)}

    def add(*parts):
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    root = step(1.0, power=1)
    task = step(0.2)
    states = {"root": root} | {f"sibling-{i}": add(root, task, step(0.03)) for i in range(3)}
    states["child"] = add(states["sibling-1"], step(0.1))
    for name, state in states.items():
        write_model(tmp_path / name, state)
    (tree,) = lineage_trees(expand_sources([tmp_path]))
    assert tree.root == "root"
    assert {edge.child: edge.parent for edge in tree.edges} == {
        **dict.fromkeys(("sibling-0", "sibling-1", "sibling-2"), "root"),
        "child": "sibling-1",
    }
