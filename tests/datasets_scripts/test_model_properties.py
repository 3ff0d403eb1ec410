"""Tables of properties that become a config of a tokenized dataset, and those that cannot."""

import datasets
import pyarrow as pa
import pytest
from zoo_fixtures import make_zoo

from datasets_scripts.tokenize import tokenize
from datasets_scripts.tokenize_config import TokenizeConfig, TokenizeError
from hf_wsl.run_folder import RunFolderError


SPLITS = {
    "zed.pth": "train",
    "ada-0": "train",
    "ada-1": "test",
    "bob-2": "validation",
    "cyd-3": "train",
    "dan-copy-of-bob": "validation",
}


def table(**changed):
    splits = {**SPLITS, **changed}
    columns = {
        "model_id": list(splits),
        "split": list(splits.values()),
        "reward": [float(i) for i in range(len(splits))],
    }
    return pa.table(columns)


def test_models_are_in_the_splits_of_their_properties(tmp_path):
    tokenize(make_zoo(tmp_path / "zoo"), tmp_path / "tokens", properties=table())
    rows = datasets.load_dataset(str(tmp_path / "tokens"), "properties")
    assert {model_id: split for split in rows for model_id in rows[split]["model_id"]} == SPLITS
    rewards = {row["model_id"]: row["reward"] for split in rows for row in rows[split]}
    assert rewards == dict(zip(SPLITS, range(6), strict=True))


def test_a_finished_dataset_with_other_properties_is_refused(tmp_path):
    make_zoo(tmp_path / "zoo")
    tokenize(tmp_path / "zoo", tmp_path / "tokens", properties=table())
    assert tokenize(tmp_path / "zoo", tmp_path / "tokens", properties=table()).already_complete
    with pytest.raises(RunFolderError, match="properties was"):
        tokenize(tmp_path / "zoo", tmp_path / "tokens", properties=table(**{"ada-0": "test"}))


@pytest.mark.parametrize(
    "properties, message",
    [
        (table().drop_columns("split"), "lacks the column split"),
        (table().slice(1), "has no row for 'zed.pth'"),
        (pa.concat_tables([table(), table()]), "lists a model twice"),
        (table(**{"ada-0": "dev"}), "has the split 'dev'; known are train, validation, test"),
        (table(**{"bob-2": "train"}), "dan-copy-of-bob and bob-2 have the same weights"),
    ],
)
def test_a_table_that_does_not_fit_the_models_is_refused(tmp_path, properties, message):
    with pytest.raises(TokenizeError, match=message):
        tokenize(make_zoo(tmp_path / "zoo"), tmp_path / "tokens", TokenizeConfig(), properties=properties)
