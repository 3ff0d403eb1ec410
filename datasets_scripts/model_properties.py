"""The config `properties` of a tokenized dataset: what is known of its models beside their weights, a row a model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_wsl.files import replacing

from .schema import PROPERTIES, TEST, TRAIN, VALIDATION, shard_path
from .tokenize_config import TokenizeError
from .work_folder import WorkFolder


def properties_digest(properties: pa.Table) -> str:
    """Tells tables of properties apart."""
    return hashlib.sha256(json.dumps(properties.to_pylist(), sort_keys=True).encode()).hexdigest()[:32]


def check_properties(properties: pa.Table, model_ids: Sequence[str]) -> None:
    """Raises TokenizeError where a table has not one row a model, or a split that datasets do not have."""
    missing = {"model_id", "split"} - set(properties.column_names)
    if missing:
        raise TokenizeError(f"The table of properties lacks the column {sorted(missing)[0]}; add it.")
    listed = properties["model_id"].to_pylist()
    known = set(listed)
    absent = [model_id for model_id in model_ids if model_id not in known]
    if absent or len(known) < len(listed):
        what = f"has no row for {absent[0]!r}" if absent else "lists a model twice"
        raise TokenizeError(f"The table of properties {what}; give one row a model.")
    unknown = set(properties["split"].to_pylist()) - {TRAIN, VALIDATION, TEST}
    if unknown:
        raise TokenizeError(
            f"The table of properties has the split {unknown.pop()!r}; known are train, validation, test."
        )


def give_splits(rows: Sequence[dict[str, Any]], properties: pa.Table) -> None:
    """Writes the splits of the table into the rows of accepted models, with duplicate groups in them.

    Raises:
        TokenizeError: bit-identical models are in different splits.
    """
    splits = dict(zip(properties["model_id"].to_pylist(), properties["split"].to_pylist(), strict=True))
    of_group: dict[str, str] = {}
    for row in rows:
        row["split"] = splits[row["model_id"]]
        group = row["duplicate_group"]
        if of_group.setdefault(group, row["split"]) != row["split"]:
            raise TokenizeError(
                f"{row['model_id']} and {group} have the same weights, and the table of properties puts them into "
                f"the splits {row['split']} and {of_group[group]}. Leave one out, or give both one split."
            )


def write_properties(work: WorkFolder, rows: Sequence[Mapping[str, Any]], properties: pa.Table) -> None:
    """One Parquet file a split, its rows in the order of those of the config `models`; files there are kept."""
    for split in dict.fromkeys(row["split"] for row in rows):
        path = work.output / shard_path(PROPERTIES, split, 0, 1)
        if path.exists():
            continue
        wanted = pa.array([row["model_id"] for row in rows if row["split"] == split])
        with replacing(path, work.temporary) as temporary:
            table = properties.take(pc.index_in(wanted, properties["model_id"]))
            pq.write_table(table.replace_schema_metadata(None), temporary, compression="zstd")
