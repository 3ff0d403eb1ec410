"""Leaves models out of a tokenized dataset: rewrites the Parquet files that hold them, row group by row group."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets_scripts.licenses import license_of, redistributable
from datasets_scripts.schema import ACCEPTED, MODELS, WITHHELD, model_features, shard_path
from datasets_scripts.window_rows import windows_writer
from hf_wsl.files import replacing, write_json

from .errors import PublishError


SHARD = re.compile(r"(?P<split>[a-z]+)(?:-(?P<family>.+))?-(?P<index>\d{5})-of-(?P<count>\d{5})\.parquet")
STATE_FILE = "withheld.json"
WriterOf = Callable[[Path, pa.Schema], pq.ParquetWriter]


@dataclass(frozen=True)
class ShardName:
    """A Parquet file of a dataset, told from its name."""

    path: str  # relative to the dataset
    split: str
    family: str | None
    index: int
    count: int


def shard_names(folder: Path, config_name: str) -> list[ShardName]:
    """The files of a config, in order.

    Raises:
        PublishError: a file of another name, or one missing of those that the names promise.
    """
    names = []
    for path in sorted((folder / config_name).glob("*")):
        name = parse_shard(f"{config_name}/{path.name}")
        if name is None:
            raise PublishError(f"{path} is none of the dataset's files. Move it away.")
        names.append(name)
    for (split, family), group in grouped(names).items():
        if [name.index for name in group] != list(range(group[0].count)):
            part = split if family is None else f"{split}-{family}"
            raise PublishError(
                f"{folder}: of {config_name}/{part}-*.parquet {len(group)} of {group[0].count} files are there. Make "
                "the dataset anew."
            )
    return names


def parse_shard(path: str) -> ShardName | None:
    """What the path of a Parquet file says, relative to the dataset; None for another file."""
    match = SHARD.fullmatch(path.rpartition("/")[2])
    if match is None:
        return None
    return ShardName(path, match["split"], match["family"], int(match["index"]), int(match["count"]))


def grouped(names: Sequence[ShardName]) -> dict[tuple[str, str | None], list[ShardName]]:
    """The files by split and family."""
    groups: dict[tuple[str, str | None], list[ShardName]] = {}
    for name in names:
        groups.setdefault((name.split, name.family), []).append(name)
    return groups


def read_models(folder: Path, names: Sequence[ShardName]) -> list[dict[str, Any]]:
    """The rows of the config `models` without the manifest, file by file.

    Raises:
        PublishError: a file is damaged, or of another version of the format.
    """
    columns = [name for name in model_features() if name != "manifest"]
    rows = []
    for name in names:
        with open_parquet(folder / name.path) as file:
            if missing := set(columns) - set(file.schema_arrow.names):
                raise PublishError(
                    f"{folder / name.path} lacks the columns {', '.join(sorted(missing))}: an older version of hf-wsl "
                    "wrote it. Make the dataset anew."
                )
            for group in range(file.num_row_groups):
                rows += file.read_row_group(group, columns=columns).to_pylist()
    return rows


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a Parquet file, whose footer tells whether it is whole.

    Raises:
        PublishError: it is not.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise PublishError(f"{path} is damaged ({' '.join(str(error).split())}). Make the dataset anew.") from error


def find_withheld(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Models whose license does not allow to share adapted copies of the weights: model_id -> reason.

    A license that says so counts for bit-identical copies too, whatever license those state. One that is merely
    unknown does not.
    """
    accepted = [row for row in rows if row["status"] == ACCEPTED]
    forbidding: dict[str, Mapping[str, Any]] = {}
    for row in accepted:
        if license_of(row["license"]).terms & {"nd", "own"}:
            forbidding.setdefault(row["weights_sha256"], row)
    withheld = {}
    for row in accepted:
        verdict, original = redistributable(row["license"]), forbidding.get(row["weights_sha256"])
        if not verdict:
            withheld[row["model_id"]] = verdict.reason
        elif original is not None:
            reason = redistributable(original["license"]).reason
            withheld[row["model_id"]] = f"has the weights of {original['model_id']}, bit for bit, whose {reason}"
    return withheld


class Staging:
    """A folder of rewritten files. Files in it stay valid while sources and withheld models are the same.

    Args:
        root: the folder; made anew where it was of another state.
        folder: the dataset.
        names: its files.
        withheld: model_id -> reason.
    """

    def __init__(self, root: Path, folder: Path, names: Sequence[ShardName], withheld: Mapping[str, str]):
        self.root, self.folder, self.withheld = root, folder, withheld
        stats = {name.path: (folder / name.path).stat() for name in names}
        state = {
            "withheld": dict(withheld),
            "files": {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()},
            "pyarrow": pa.__version__,
        }
        path = root / STATE_FILE
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != state:
            shutil.rmtree(root, ignore_errors=True)
            write_json(path, state)

    def windows(self, names: Sequence[ShardName]) -> dict[str, Path]:
        """Path in the published dataset -> file, of the config `windows`: untouched files are those of the dataset."""
        return self._kept(names, windows_writer)

    def models(self, names: Sequence[ShardName]) -> dict[str, Path]:
        """The same of the config `models`, where withheld models move to a split of their own, without manifest."""
        moved = self.root / shard_path(MODELS, WITHHELD, 0, 1)
        if not moved.exists():
            with replacing(moved) as temporary, models_writer(temporary, model_features().arrow_schema) as writer:
                for name in names:
                    with open_parquet(self.folder / name.path) as file:
                        for table in _moved_rows(file, self.withheld):
                            writer.write_table(table)
        return {**self._kept(names, models_writer), shard_path(MODELS, WITHHELD, 0, 1): moved}

    def properties(self, names: Sequence[ShardName]) -> dict[str, Path]:
        """The same of the config `properties`, which says nothing of withheld models."""
        return self._kept(names, models_writer)

    def _kept(self, names: Sequence[ShardName], writer_of: WriterOf) -> dict[str, Path]:
        kept: list[tuple[ShardName, Path]] = []
        for name in names:
            source = self.folder / name.path
            with open_parquet(source) as file:
                rows = _kept_rows(file, self.withheld)
                if rows == file.metadata.num_rows:
                    kept.append((name, source))
                elif rows:
                    kept.append((name, self._rewrite(name, file, writer_of)))
        return _numbered(kept)

    def _rewrite(self, name: ShardName, file: pq.ParquetFile, writer_of: WriterOf) -> Path:
        target = self.root / name.path
        if not target.exists():
            with replacing(target) as temporary, writer_of(temporary, file.schema_arrow) as writer:
                for table in _without(file, self.withheld):
                    writer.write_table(table, row_group_size=len(table))
        return target


def models_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd")


def _is_withheld(table: pa.Table, withheld: Mapping[str, str]) -> pa.ChunkedArray:
    return pc.is_in(table["model_id"], value_set=pa.array(list(withheld), pa.string()))


def _kept_rows(file: pq.ParquetFile, withheld: Mapping[str, str]) -> int:
    """How many rows of a file are left; reads the ids only."""
    groups = (file.read_row_group(n, columns=["model_id"]) for n in range(file.num_row_groups))
    return sum(len(group) - pc.sum(_is_withheld(group, withheld)).as_py() for group in groups)


def _without(file: pq.ParquetFile, withheld: Mapping[str, str]) -> Iterator[pa.Table]:
    """The row groups of a file, one in memory at a time, without the rows of withheld models; none is empty."""
    for number in range(file.num_row_groups):
        ids = file.read_row_group(number, columns=["model_id"])
        here = _is_withheld(ids, withheld)
        if not pc.all(here).as_py():
            group = file.read_row_group(number)
            yield group.filter(pc.invert(here)) if pc.any(here).as_py() else group


def _moved_rows(file: pq.ParquetFile, withheld: Mapping[str, str]) -> Iterator[pa.Table]:
    """The rows of withheld models as the split `withheld` has them."""
    columns = [name for name in file.schema_arrow.names if name != "manifest"]
    for number in range(file.num_row_groups):
        group = file.read_row_group(number, columns=columns)
        rows = group.filter(_is_withheld(group, withheld)).to_pylist()
        changed = [withheld_row(row, withheld[row["model_id"]]) for row in rows]
        if changed:
            yield pa.Table.from_pylist(changed, model_features().arrow_schema)


def withheld_row(row: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """A row of `models` whose windows are not in the published dataset; its counts stay those of the model."""
    return {**row, "split": WITHHELD, "status": WITHHELD, "outcome": WITHHELD, "reason": reason, "manifest": None}


def _numbered(kept: Sequence[tuple[ShardName, Path]]) -> dict[str, Path]:
    """Names without gaps for the files that are left."""
    files = dict(kept)
    named = {}
    for (split, family), group in grouped(list(files)).items():
        config_name = group[0].path.split("/")[0]
        for index, name in enumerate(group):
            named[shard_path(config_name, split, index, len(group), family)] = files[name]
    return named
