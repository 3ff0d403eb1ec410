"""What is known of models: from files beside their weights, or from a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from datasets_scripts.sources import ModelSource
from modeling_wsl.checkpoint_errors import read_json


ZOO_TABLE, ZOO_MODELS = "properties.parquet", "models"
OWN_FILES = ("model.json", "properties.json")  # beside a model's weights; what the later one says counts
INDEX = "index.json"  # above the models: a list of records
ID_KEYS = ("model_id", "id")


def model_sources(sources: Sequence[str]) -> list[str]:
    """Sources as `expand_sources` takes them: in place of a zoo its models, whose ids are those of its table."""
    return [str(Path(s) / ZOO_MODELS) if (Path(s) / ZOO_TABLE).is_file() else s for s in sources]


def read_properties(table: str, sources: Sequence[str], models: Sequence[ModelSource]) -> pd.DataFrame:
    """Reads what is known of the models.

    Args:
        table: Parquet, CSV, JSON or JSON lines with a column `model_id` or `id`, or a zoo's folder. Empty: the
            models' own `properties.json` and `model.json`, and an `index.json` in a source that is a folder of models.
        sources: where the models are from.
        models: what they were expanded to.

    Returns:
        One row a model that anything is known of, in their order, indexed by `model_id`. Of records the numbers, text
        and booleans are columns; so is each name of a list `properties` of `{name, value}`; `licence` and `owner`
        follow from `license` and `repo`.

    Raises:
        ValueError: a table that cannot be read, has no column of ids, has a model twice, or knows none of the models.
    """
    ids = [model.model_id for model in models]
    if table:
        known = _read_table(Path(table))
        frame = known.loc[[model_id for model_id in ids if model_id in known.index]]
        if frame.empty:
            raise ValueError(
                f"{table}: none of the {len(ids)} models is in it: it has {_some(known.index)}, the models are "
                f"{_some(ids)}. Name the models so that their ids are those of the table."
            )
        return frame
    listed = _indexed(sources)
    records = {model.model_id: {**listed.get(model.model_id, {}), **_own_record(model)} for model in models}
    records = {model_id: record for model_id, record in records.items() if record}
    if not records:
        raise ValueError(
            f"Nothing is known of the {len(ids)} models: there is no {' or '.join(OWN_FILES)} beside their weights. "
            "Give a table of them as --properties."
        )
    frame = pd.DataFrame(list(records.values()), index=pd.Index(records, name=ID_KEYS[0]))
    return frame.infer_objects()


def _read_table(path: Path) -> pd.DataFrame:
    path = path / ZOO_TABLE if path.is_dir() else path
    readers = {
        ".parquet": pd.read_parquet,
        ".csv": pd.read_csv,
        ".jsonl": lambda file: pd.DataFrame(
            _columns(record) for record in pd.read_json(file, lines=True).to_dict("records")
        ),
        ".json": lambda file: pd.DataFrame(_records(file)),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: a table of properties is {', '.join(readers)}, or the folder of a zoo.")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such table of properties.")
    try:
        table = readers[path.suffix](path)
    except (ValueError, OSError) as error:  # pandas' and Arrow's parser errors are ValueErrors
        raise ValueError(f"{path}: this table of properties cannot be read: {error}") from error
    key = next((key for key in ID_KEYS if key in table.columns), None)
    if key is None:
        raise ValueError(f"{path}: there is no column {' or '.join(ID_KEYS)}; the columns are {_some(table.columns)}.")
    table = table.set_index(table[key].astype(str).rename(ID_KEYS[0]))
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()][0]
        raise ValueError(f"{path}: the model {twice!r} stands in it twice. Keep one row a model.")
    return table


def _records(path: Path) -> list[dict[str, Any]]:
    content = read_json(path, path.name)
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise ValueError(f"{path}: a table in JSON is a list of objects.")
    return [_columns(record) for record in content]


def _indexed(sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    indices = [Path(source) / INDEX for source in sources]
    records = [record for index in indices if index.is_file() for record in _records(index)]
    return {str(record[key]): record for record in records for key in ID_KEYS if key in record}


def _own_record(model: ModelSource) -> dict[str, Any]:
    """Columns that a model's own files and the list that named it give."""
    folder = model.path
    record: dict[str, Any] = {}
    for path in [folder / name for name in OWN_FILES] if folder is not None and folder.is_dir() else []:
        content = read_json(path, path.name) if path.is_file() else {}
        record |= _columns(content) if isinstance(content, dict) else {}
    return {**record, **model.facts}


def _columns(record: Mapping[str, Any]) -> dict[str, Any]:
    named = record.get("properties")
    pairs = [item for item in named if isinstance(item, dict)] if isinstance(named, list) else []
    everything = {**record, **{item.get("name"): item.get("value") for item in pairs}}
    columns = {key: value for key, value in everything.items() if key and isinstance(value, str | int | float | bool)}
    if isinstance(columns.get("license"), str):
        columns.setdefault("licence", columns.pop("license"))
    if "/" in str(columns.get("repo", "")):
        columns.setdefault("owner", columns["repo"].split("/")[0])
    return columns


def _some(names: Sequence[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
