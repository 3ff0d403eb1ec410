"""`hf-wsl probe` on a small population: real models, a real backbone, every baseline."""

import json
import shutil

import numpy as np
import pytest
from command_line import hf_wsl
from evaluate_fixtures import save_backbone
from probe_fixtures import write_population
from safetensors.torch import load_file, save_file

from datasets_scripts.embedding import METHODS, EmbeddingTable
from trainers.probing.probe import probe
from trainers.probing.probe_config import ProbeConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a population and a backbone."""
    folder = tmp_path_factory.mktemp("probe")
    write_population(folder / "models")
    save_backbone(folder / "backbone")
    return folder


def config_of(place, **options):
    return ProbeConfig(
        **{
            "models": [str(place / "models")],
            "target": ["test_accuracy", "activation"],
            "backbones": [f"mine={place / 'backbone'}"],
            "bootstrap": 20,
            "probes": ["ridge"],
            "output_dir": str(place / "out"),
            "embedding": {"token_size": 32, "latent_size": 8},
            **options,
        }
    )


@pytest.fixture(scope="module")
def results(place):
    return probe(config_of(place))


def test_every_backbone_stands_beside_every_baseline_and_the_constant(results):
    accuracy, activation = results["targets"]["test_accuracy"], results["targets"]["activation"]
    sections = {"position", "probe", "shapes only"}
    assert set(accuracy["results"]) == {"mine", "untrained", "mean", *METHODS, *sections}
    assert set(activation["results"]) == {"mine", "untrained", "majority", *METHODS, *sections}
    assert (accuracy["kind"], activation["kind"]) == ("regression", "classification")
    assert results["models"]["splits"] == {"train": 18, "validation": 9, "test": 9}
    assert results["models"]["groups"] == 12 and results["skipped"] == {} and results["warnings"] == []
    assert accuracy["measured"] == 9


def test_what_the_weights_tell_is_found_and_a_constant_finds_nothing(results):
    def ridge(target, name, probe="ridge"):
        return results["targets"][target]["results"][name][probe]["metrics"]

    assert ridge("test_accuracy", "statistics")["r2"] > 0.9
    assert ridge("activation", "statistics")["accuracy"] == 1
    assert ridge("test_accuracy", "mean", "constant")["r2"] <= 0
    assert ridge("test_accuracy", "mean", "constant")["spearman"] is None


def test_the_record_and_the_page_hold_what_was_returned(place, results):
    assert json.loads((place / "out" / "probe.json").read_text()) == results
    page = (place / "out" / "probe.md").read_text()
    lines = [line.split(" | ") for line in page.split("## activation")[0].splitlines() if line.startswith("| ")]
    names = [cells[0].removeprefix("| ") for cells in lines[2:]]
    figures = results["targets"]["test_accuracy"]["results"]
    r2 = [next(iter(figures[name].values()))["metrics"]["r2"] for name in names]
    assert set(names) == set(figures) and r2 == sorted(r2, reverse=True)
    assert "[" in lines[2][2] and "MAE" in lines[0][5]


def test_tables_of_embeddings_are_kept_until_what_they_are_made_of_changes(place, results):
    folder = place / "out" / "embeddings"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    again = probe(config_of(place))
    assert again == results
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    probe(config_of(place, embedding={"token_size": 32, "latent_size": 4}, target=["epoch"], bootstrap=0))
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert {name for name in before if before[name] != after[name]} >= {"pca.parquet", "random-projection.parquet"}
    assert EmbeddingTable.read(folder / "pca.parquet").embeddings.shape == (36, 4)
    probe(config_of(place))


def test_pca_is_fitted_on_the_training_models_alone(place, results):
    listed = json.loads((place / "out" / "embeddings" / "training_models.json").read_text())
    assert len(listed) == 18
    assert {int(entry["model_id"][7:11]) % 4 for entry in listed} == {0, 1}


@pytest.mark.slow
def test_groups_left_out_in_two_processes_give_what_one_gives(place):
    options = {
        "split": "leave-group-out",
        "folds": 3,
        "baselines": ["statistics"],
        "backbones": [],
        "target": ["epoch"],
        "probes": ["ridge", "mlp"],
    }
    one = probe(config_of(place, **options, output_dir=str(place / "one")))
    more = {**options, "target": ["epoch", "activation"], "num_workers": 2, "output_dir": str(place / "two")}
    two = probe(config_of(place, **more))
    assert one["targets"]["epoch"] == two["targets"]["epoch"]
    assert one["models"]["splits"] == {"leave-group-out": 36} and one["targets"]["epoch"]["measured"] == 36
    assert "left out in 3 parts" in (place / "one" / "probe.md").read_text()


def test_missing_values_and_models_without_embedding_are_left_out_and_counted(place, results, tmp_path):
    shutil.copytree(place / "models", tmp_path / "models")
    records = sorted((tmp_path / "models").rglob("properties.json"))
    for path, change in zip(
        records, ({"test_accuracy": None}, {"split": None}, {"epoch": float("nan")}), strict=False
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    records[3].unlink()
    full = EmbeddingTable.read(place / "out" / "embeddings" / "statistics.parquet")
    full.select(full.model_ids[:-2]).write(tmp_path / "table.parquet")
    options = {"backbones": [], "baselines": ["statistics"], "tables": {"given": str(tmp_path / "table.parquet")}}
    found = probe(
        config_of(
            place,
            **options,
            models=[str(tmp_path / "models")],
            target=["test_accuracy", "epoch"],
            output_dir=str(tmp_path),
        )
    )
    assert found["models"]["count"] == 36 - 4
    assert found["models"]["left_out"] == {
        "nothing is known of them": 1,
        "no value of their split": 1,
        "not in the embeddings given": 2,
    }
    assert found["targets"]["test_accuracy"]["left_out"] == {"no value": 1}
    assert found["targets"]["epoch"]["left_out"] == {"no value": 1}


def test_a_baseline_that_does_not_fit_the_models_is_skipped_with_the_reason(place, tmp_path):
    shutil.copytree(place / "models", tmp_path / "models")
    path = tmp_path / "models" / "member_0002" / "epoch_001" / "model.safetensors"
    state = load_file(path)
    save_file({"fc.weight": state["fc.weight"][:, :8].clone(), "fc.bias": state["fc.bias"]}, path)
    options = {"backbones": [], "baselines": ["statistics", "pooled-statistics"], "target": ["epoch"]}
    found = probe(config_of(place, **options, models=[str(tmp_path / "models")], output_dir=str(tmp_path / "out")))
    assert "member_0002/epoch_001" in found["skipped"]["statistics"]
    assert set(found["targets"]["epoch"]["results"]) == {"mean", "pooled-statistics"}
    assert "Not used" in (tmp_path / "out" / "probe.md").read_text()


def test_sections_of_a_given_table_are_lines_and_families_are_told_where_owners_are_known(place, results, tmp_path):
    options = {"backbones": [], "baselines": ["-"], "target": ["test_accuracy"], "split": "leave-group-out"}
    given = {"given": str(place / "out" / "embeddings" / "profile.parquet")}
    shutil.copytree(place / "models", tmp_path / "models")
    for path in (tmp_path / "models").rglob("properties.json"):
        record = json.loads(path.read_text())
        number = int(record["member"][-2:])
        path.write_text(json.dumps(record | {"owner": f"owner{number}", "family": f"family{number // 6}"}))
    models = [str(tmp_path / "models")]
    found = probe(config_of(place, **options, folds=3, tables=given, models=models, output_dir=str(tmp_path / "out")))
    lines = {"given", "given, shapes only", "given, position", "given, probe"}
    assert set(found["sizes"]) == set(found["families"]["results"]) == lines
    assert found["sizes"]["given"] + found["sizes"]["given, shapes only"] == 273
    assert found["families"]["count"] == 36 and found["targets"]["test_accuracy"]["groups"] == 12
    page = (tmp_path / "out" / "probe.md").read_text()
    assert "## Families across owners" in page and "Nothing can be concluded" not in page
    assert results["families"] == {}


def test_copies_under_other_names_are_warned_of(place, tmp_path):
    shutil.copytree(place / "models", tmp_path / "models")
    source, target = (tmp_path / "models" / name for name in ("member_0000/epoch_002", "member_0003/epoch_002"))
    shutil.copy(source / "model.safetensors", target / "model.safetensors")
    options = {"backbones": [], "baselines": ["statistics"], "target": ["epoch"], "bootstrap": 0}
    found = probe(config_of(place, **options, models=[str(tmp_path / "models")], output_dir=str(tmp_path / "out")))
    assert len(found["warnings"]) == 1 and found["warnings"][0].startswith("2 models have embeddings equal")


def test_the_command_reads_its_options_and_names_the_page(place, tmp_path):
    arguments = ["probe", "--models", str(place / "models"), "--target", "epoch", "--baselines", "statistics"]
    arguments += [
        "--group",
        "",
        "--split",
        "random",
        "--bootstrap",
        "0",
        "--probes",
        "ridge",
        "--output_dir",
        str(tmp_path),
    ]
    ran = hf_wsl(*arguments)
    assert ran.exit_code == 0 and f"{tmp_path / 'probe.md'}: 1 embeddings of 36 models" in ran.output
    assert "ridge: Kendall" in ran.output and "| statistics | 14 |" in ran.output
    assert "Nothing can be concluded: 5 measured groups are fewer than 10." in ran.output
    record = json.loads((tmp_path / "probe.json").read_text())
    assert record["models"]["groups"] == 36
    assert "Every model is a group of its own" in (tmp_path / "probe.md").read_text()
    assert np.isfinite(record["targets"]["epoch"]["results"]["statistics"]["ridge"]["metrics"]["r2"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": ["accuracy"]}, "no property 'accuracy'; they have .*Did you mean 'test_accuracy'"),
        ({"target": ["always"]}, "target 'always': The target is 1.0 for all 36 models"),
        ({"group": "owner"}, "no property 'owner'"),
        ({"split": "fold"}, "no property 'fold'"),
        ({"group": "always", "split": "random"}, "1 group"),
        ({"group": "activation", "split": "leave-group-out"}, "needs three groups of models"),
        ({"group": "activation"}, "'relu' is in the splits"),
        ({"target": []}, "option 'target' is missing"),
        ({"baselines": ["statistic"]}, "Did you mean 'statistics'"),
        ({"probes": ["ridge", "tree"]}, "has 'tree'"),
        ({"probes": ["-"]}, "option 'probes' has '-'"),
        ({"tables": {"pca": "made.parquet"}}, "option 'tables' has 'pca'"),
        ({"tables": {"untrained": "made.parquet"}}, "option 'tables' has 'untrained'"),
        ({"tables": {"mine": "made.parquet"}}, "the name 'mine' of .* is taken"),
        ({"fractions": [0.5, 0.2, 0.2]}, "sum to 1"),
        ({"baselines": ["-"], "backbones": []}, "there are no embeddings"),
        ({"backbones": ["pca=somewhere"]}, "the name 'pca' of somewhere is taken"),
        ({"embedding": {"pooling": "mean"}}, "'pooling', which follows"),
        ({"embedding": {"halos": 3}}, "unknown option 'halos'"),
        ({"confidence": 95}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_anything_is_embedded(place, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        probe(config_of(place, **{"output_dir": str(tmp_path), **options}))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_backbone_that_cannot_be_read_is_an_error_and_not_a_gap(place, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        probe(config_of(place, backbones=[str(tmp_path / "nowhere")], output_dir=str(tmp_path / "out")))
