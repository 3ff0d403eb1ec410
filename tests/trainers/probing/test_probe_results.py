"""Probes in results pages: poolings side by side, and targets that do not vary."""

import json
from types import SimpleNamespace

import pytest

from trainers.reproduction.plan import ZOO, Step
from trainers.reproduction.results import probe_controls
from trainers.reproduction.results_page import probe_section
from trainers.reproduction.steps import check_data


def entry(work_dir, pooling, r2=0.5):
    """An entry whose probe of controls has been done."""
    found = {
        "models": {"count": 9, "groups": 3, "splits": {}},
        "skipped": {"random-projection": f"no {pooling}"},
        "sizes": {"pca": 8},
        "warnings": [],
        "targets": {"gap": {"kind": "regression", "results": {"pca": measured(r2), "mean": {"constant": FIGURES}}}},
    }
    (work_dir / pooling).mkdir()
    (work_dir / pooling / "probe.json").write_text(json.dumps(found))
    return SimpleNamespace(evaluations=[SimpleNamespace(folder=pooling)], dataset="zoo", pooling=pooling)


FIGURES = {"metrics": {"r2": 0.0, "spearman": None}, "intervals": {"r2": None}}


def measured(r2):
    return {"ridge": {"metrics": {"r2": r2, "spearman": None}, "intervals": {"r2": None}}}


@pytest.mark.parametrize("order", [("mean", "layers"), ("layers", "mean")])
def test_names_tell_the_pooling_in_whichever_order_it_comes(tmp_path, order):
    found = probe_controls([entry(tmp_path, pooling) for pooling in order], tmp_path)["zoo"]
    assert set(found["targets"]["gap"]["results"]) == {"pca", "pca, layers", "mean"}
    assert found["sizes"] == {"pca": 8, "pca, layers": 8}
    assert found["skipped"] == {"random-projection": "no mean", "random-projection, layers": "no layers"}


def test_a_figure_that_is_not_defined_is_a_dash_and_never_the_best(tmp_path):
    controls = probe_controls([entry(tmp_path, "mean", r2=None), entry(tmp_path, "layers")], tmp_path)
    text = "\n".join(probe_section({"controls": controls, "entries": [], "paper": {}}))
    assert "–" in text and "gap: pca, layers (0.500)" in text


def test_images_of_a_zoo_that_cannot_be_read_are_met_before_any_work(tmp_path):
    zoo = Step(ZOO, "zoo", {"options": {"data": {"images": str(tmp_path / "nowhere")}}})
    with pytest.raises(ValueError, match="nowhere"):
        check_data([zoo])
