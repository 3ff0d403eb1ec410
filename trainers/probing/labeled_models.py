"""Models with what is known of them, the groups they are of, and the splits they are in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datasets_scripts.sources import PROPERTIES_FILE, ZOO_TABLE, ModelSource, expand_sources, zoo_folders
from hf_wsl.options import ConfigError, nearest
from hf_wsl.run_folder import SETTINGS_FILE
from modeling_wsl.checkpoints.errors import read_json

from .group_folds import random_splits
from .probe_config import LEAVE_GROUP_OUT, RANDOM, ProbeConfig
from .probe_embeddings import ProbeTask, prepare_task


OWN_FILES = ("model.json", PROPERTIES_FILE)  # beside a model's weights; what the later one says counts
INDEX = "index.json"  # above the models: a list of records
ID_KEYS = ("model_id", "id")


@dataclass(frozen=True)
class LabeledModels:
    """All that the probes know, embeddings apart.

    Attributes:
        sources: what was named, as `expand_sources` takes it.
        models: what it was expanded to; also those that nothing is known of.
        properties: indexed by model_id; the rows that can be used.
        groups: `[rows]` text.
        splits: `[rows]` of "train", "validation", "test"; None: each group is left out in turn.
        left_out: reason -> how many models are not among the rows.
    """

    sources: list[str]
    models: list[ModelSource]
    properties: pd.DataFrame
    groups: np.ndarray
    splits: np.ndarray | None
    left_out: dict[str, int]

    def task(self, target: str, num_folds: int, rows: np.ndarray | None = None) -> tuple[ProbeTask, np.ndarray]:
        """The target made ready, and the rows that have a value of it.

        Args:
            rows: indices to choose from; None: all.

        Raises:
            ValueError: naming the target: see `prepare_task`.
        """
        rows = np.arange(len(self.properties)) if rows is None else rows
        column = self.properties[target].replace([np.inf, -np.inf], np.nan)
        rows = rows[column.notna().to_numpy()[rows]]
        values = column.iloc[rows].infer_objects()
        is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        splits = None if self.splits is None else self.splits[rows]
        if not len(rows):
            raise ValueError(f"target '{target}': no model has a value of it.")
        try:
            numbers = values.to_numpy(np.float64) if is_number else values.astype(str).to_numpy(np.str_)
            return prepare_task(numbers, self.groups[rows], splits, num_folds), rows
        except ValueError as error:
            raise ValueError(f"target '{target}': {error}") from error

    def owners_and_families(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`[rows]` each, text; "" where nothing is known of it."""
        known = self.properties.iloc[rows].reindex(columns=["owner", "family"])
        owners, families = (known[name].fillna("").astype(str).to_numpy(np.str_) for name in known)
        return owners, families


def label_models(config: ProbeConfig) -> LabeledModels:
    """Reads what is known of the models, and divides them.

    Raises:
        ConfigError: a target, group or split that is no property.
        ValueError: models or properties that cannot be read, or do not belong together; too few groups.
    """
    sources = config.models
    models = expand_sources(sources)
    properties = read_properties(config.properties, sources, models)
    left_out = {"nothing is known of them": len(models) - len(properties)}
    group = ("member" if "member" in properties else "") if config.group is None else config.group
    split = config.split or ("split" if "split" in properties else RANDOM)
    needed = {"group": [group] if group else [], "split": [] if split in (RANDOM, LEAVE_GROUP_OUT) else [split]}
    for option, names in {"target": config.target, **needed}.items():
        for name in names:
            if name not in properties:
                known = list(map(str, properties.columns))
                raise ConfigError(
                    f"option '{option}': the models have no property '{name}'; they have {', '.join(known)}."
                    f"{nearest(name, known)}"
                )
    for option, names in needed.items():
        present = properties[names].notna().all(axis=1)
        left_out[f"no value of their {option}"] = int((~present).sum())
        properties = properties[present]
    if properties.empty:
        raise ValueError("No model has both a group and a split. Give others as --group and --split.")
    groups = (properties[group] if group else properties.index).astype(str).to_numpy(np.str_)
    if config.group is None and group and "parent" in properties:
        groups = _families(groups, properties["parent"])
    if split == LEAVE_GROUP_OUT:
        splits = None
    elif split == RANDOM:
        splits = random_splits(groups, config.shares, config.seed)
    else:
        splits = properties[split].astype(str).to_numpy(np.str_)
    return LabeledModels(
        sources, models, properties, groups, splits, {reason: count for reason, count in left_out.items() if count}
    )


def _families(members: np.ndarray, parents: pd.Series) -> np.ndarray:
    """`[rows]`: the member that a row's member descends from, for fine-tuned members are near copies of it.

    A parent of another zoo, which is not probed, may have the name of a member that is: it is marked as a parent. With
    several zoos names begin with the zoo's, and are the same thing where they are equal.
    """
    known, parent_of = set(members.tolist()), {}
    for member, parent in zip(members, parents, strict=True):
        if pd.notna(parent):
            name = str(parent).rpartition("/")[0] or str(parent)
            parent_of[member] = name if "/" in name and name in known else f"parent {name}"

    def first(member: str) -> str:
        passed = []
        while member in parent_of and member not in passed:
            passed.append(member)
            member = parent_of[member]
        return member

    return np.array([first(str(member)) for member in members])


def read_properties(table: str, sources: Sequence[str], models: Sequence[ModelSource]) -> pd.DataFrame:
    """Reads what is known of the models.

    Args:
        table: Parquet, CSV, JSON or JSON lines with a column `model_id` or `id`, or a zoo's folder. Empty: the
            models' own `properties.json` and `model.json`, an `index.json` in a source that is a folder of models, and
            the tables of a zoo of other researchers (see `datasets_scripts/populations.py`).
        sources: where the models are from.
        models: what they were expanded to.

    Returns:
        One row a model that anything is known of, in their order, indexed by `model_id`. Of records the numbers, text
        and booleans are columns; so is each name of a list `properties` of `{name, value}`; `license` and `owner`
        follow from `license` and `repo`. Where several zoos are named, `member` and `parent` begin with the name of
        the zoo that they are of.

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
        return _name_zoos(frame, sources)
    listed = _indexed(sources)
    records = {model.model_id: {**listed.get(model.model_id, {}), **_own_record(model)} for model in models}
    records = {model_id: record for model_id, record in records.items() if record}
    if not records:
        raise ValueError(
            f"Nothing is known of the {len(ids)} models: there is no {' or '.join(OWN_FILES)} beside their weights. "
            "Give a table of them as --properties."
        )
    frame = pd.DataFrame(list(records.values()), index=pd.Index(records, name=ID_KEYS[0]))
    return _name_zoos(frame.infer_objects(), sources)


def _name_zoos(frame: pd.DataFrame, sources: Sequence[str]) -> pd.DataFrame:
    """Members of several zoos have equal names: puts each zoo's before them, as `expand_sources` does with ids."""
    zoos = zoo_folders(sources)
    for zoo in zoos if len(zoos) > 1 else []:
        settings = zoo / SETTINGS_FILE
        parents = read_json(settings, settings.name).get("parents") if settings.is_file() else None
        rows = frame.index.str.startswith(f"{zoo.name}/")
        of_parents = Path(parents or "parents").name
        of_parents = f"parents of {zoo.name}" if of_parents == zoo.name else of_parents  # another folder of that name
        for column, name in (("member", zoo.name), ("parent", of_parents)):
            if column in frame:
                chosen = rows & frame[column].notna()
                frame = frame.assign(**{column: frame[column].mask(chosen, f"{name}/" + frame[column].astype(str))})
    return frame


def _read_table(path: Path) -> pd.DataFrame:
    path = path / ZOO_TABLE if path.is_dir() else path
    readers = {
        ".parquet": pd.read_parquet,
        ".csv": _read_csv,
        ".jsonl": lambda file: pd.DataFrame(_records(file)),
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


def _read_csv(path: Path) -> pd.DataFrame:
    # Ids stay text ("001"), and so do classes called "None" or "null"; "nan" is how programs write a missing number.
    ids = dict.fromkeys(ID_KEYS, str)
    return pd.read_csv(path, dtype=ids, keep_default_na=False, na_values=["", "nan", "NaN"])


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        content = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
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
    return {**record, **model.properties, **model.facts}


def _columns(record: Mapping[str, Any]) -> dict[str, Any]:
    named = record.get("properties")
    pairs = [item for item in named if isinstance(item, dict)] if isinstance(named, list) else []
    merged = {**record, **{item.get("name"): item.get("value") for item in pairs}}
    columns = {key: value for key, value in merged.items() if key and isinstance(value, str | int | float | bool)}
    if isinstance(columns.get("license"), str):
        columns.setdefault("license", columns.pop("license"))
    if "/" in str(columns.get("repo", "")):
        columns.setdefault("owner", columns["repo"].split("/")[0])
    return columns


def _some(names: Sequence[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
