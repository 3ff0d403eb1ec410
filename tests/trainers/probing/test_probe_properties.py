"""What is known of models, wherever it is written."""

import json

import pandas as pd
import pytest
from probe_fixtures import write_population

from datasets_scripts.sources import expand_sources
from trainers.probing.labeled_models import label_models, read_properties
from trainers.probing.probe_config import ProbeConfig


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    return write_population(tmp_path_factory.mktemp("population") / "models")


def read(table, *sources):
    names = [str(source) for source in sources]
    return read_properties(str(table), names, expand_sources(names))


def test_a_record_beside_the_weights_gives_its_columns(population):
    frame = read("", population)
    assert len(frame) == 36 and frame.index[0] == "member_0000/epoch_000"
    assert frame["test_accuracy"].dtype == float and frame["activation"].iloc[0] == "relu"


def test_a_public_models_record_gives_its_named_properties_license_and_owner(population, tmp_path):
    record = {"id": "a model", "repo": "someone/thing", "license": "MIT", "params": 3, "dtypes": ["float32"]}
    record["properties"] = [{"name": "epoch", "value": 4, "source": "file name"}, {"name": "note", "value": None}]
    folder = tmp_path / "some folder"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(record))
    (folder / "model.safetensors").write_bytes((next(population.rglob("*.safetensors"))).read_bytes())
    frame = read("", folder)
    assert frame.loc["a model"].to_dict() == {
        "id": "a model",
        "repo": "someone/thing",
        "license": "MIT",
        "owner": "someone",
        "params": 3,
        "epoch": 4,
    }


def test_an_index_above_the_models_knows_what_they_do_not(tmp_path, population):
    folder = tmp_path / "models"
    write_population(folder)
    (folder / "index.json").write_text(json.dumps([{"id": "member_0003/epoch_001", "gap": 0.25, "epoch": 99}]))
    frame = read("", folder)
    assert frame["gap"].notna().sum() == 1
    assert frame.loc["member_0003/epoch_001", "gap"] == 0.25 and frame.loc["member_0003/epoch_001", "epoch"] == 1


def write_zoo(folder, parents=None):
    """With parents, each member starts from that of its own name."""
    write_population(folder / "models")
    if parents:
        (folder / "settings.json").write_text(json.dumps({"parents": str(parents)}))
        for path in folder.rglob("properties.json"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps({**record, "parent": f"{record['member']}/epoch_002"}))
    pd.DataFrame({"model_id": ["member_0002/epoch_001"], "epoch": [1]}).to_parquet(folder / "properties.parquet")
    return folder


def labels(*zoos):
    config = {"target": ["epoch"], "baselines": ["statistics"], "output_dir": "unused"}
    return label_models(ProbeConfig(models=[str(zoo) for zoo in zoos], **config))


def test_fine_tuned_members_share_the_group_of_the_member_that_they_start_from(tmp_path):
    first = write_zoo(tmp_path / "first")
    second = write_zoo(tmp_path / "second", parents=first)
    third = write_zoo(tmp_path / "third", parents=second)
    assert set(labels(second).groups) == {f"parent member_{i:04d}" for i in range(12)}
    found = labels(first, second, third)
    assert found.properties.index[0] == "first/member_0000/epoch_000" and len(found.models) == 108
    assert set(found.groups) == {f"first/member_{i:04d}" for i in range(12)}
    apart = labels(first, third)
    assert len(set(apart.groups)) == 24 and {name for name in apart.groups if "second/member_0003" in name}


def test_ids_and_classes_of_a_table_stay_text(population, tmp_path):
    folder = tmp_path / "models"
    for name in ("001", "1"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(next(population.rglob("*.safetensors")).read_bytes())
    (tmp_path / "table.csv").write_text("id,dropout,gap\n001,None,nan\n1,high,0.5\n")
    lines = ['{"id": "001", "made_at": "2024-01-01"}', '{"id": "1", "made_at": "2024-01-02"}']
    (tmp_path / "table.jsonl").write_text("\n".join(lines) + "\n")
    table = read(tmp_path / "table.csv", folder)
    assert table["dropout"].to_dict() == {"001": "None", "1": "high"} and table["gap"].dtype == float
    assert read(tmp_path / "table.jsonl", folder)["made_at"].to_dict() == {"001": "2024-01-01", "1": "2024-01-02"}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl"])
def test_tables_of_every_kind_are_joined_by_id(population, tmp_path, suffix):
    table = pd.DataFrame(
        {"id": ["member_0001/epoch_002", "unknown", "member_0000/epoch_000"], "score": [0.5, 1.0, 2.0]}
    )
    path = tmp_path / f"table.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=suffix == "jsonl")
    frame = read(path, population)
    assert frame["score"].to_dict() == {"member_0000/epoch_000": 2.0, "member_0001/epoch_002": 0.5}


def test_a_zoo_is_a_source_and_a_table_at_once(tmp_path):
    zoo = write_zoo(tmp_path / "zoo")
    assert list(read(zoo, zoo).index) == ["member_0002/epoch_001"]
    assert len(read("", zoo)) == 36


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("table.csv", "name,score\na,1\n", "no column model_id or id; the columns are name, score"),
        ("table.csv", "id,score\na,1\na,2\n", "'a' stands in it twice"),
        ("table.csv", "id,score\na,1\n", "none of the 36 models is in it: it has a, the models are member_0000"),
        ("table.csv", "", "cannot be read"),
        ("table.json", '{"id": "a"}', "a list of objects"),
        ("table.xlsx", "", "a table of properties is .parquet, .csv"),
        ("table.parquet", "no Parquet", "cannot be read"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_with_the_reason(population, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, population)


def test_models_of_which_nothing_is_known_are_refused(population, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((next(population.rglob("*.safetensors"))).read_bytes())
    with pytest.raises(
        ValueError, match="Nothing is known of the 1 models: there is no model.json or properties.json"
    ):
        read("", tmp_path)
    with pytest.raises(ValueError, match="there is no such table"):
        read(tmp_path / "missing.csv", population)
