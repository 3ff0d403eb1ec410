"""From the parts of all models to Parquet files. Which rows go into which file is settled before any is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_wsl.files import replacing
from modeling_wsl.tokens.layer_normalization import LayerStatistics
from modeling_wsl.tokens.manifest import WeightManifest

from .schema import MODELS, REFUSED, WINDOWS, model_features, shard_path
from .tokenize_config import DatasetConfig
from .window_rows import normalized_row, window_schema
from .work_folder import WorkFolder


# Every row names its model, so that readers can skip row groups by it; the rest of a row is not searched.
SEARCHABLE = ["model_id", "window_index", "token_start", "num_tokens"]


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one model: `count` windows from the `first` on."""

    model: int
    first: int
    count: int


@dataclass(frozen=True)
class Shard:
    """One Parquet file to write."""

    config_name: str
    path: str  # relative to the output
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class PlannedModel:
    """What the layout of the files depends on.

    Attributes:
        index: of its part and record.
        row_bytes: of each of its windows; empty for a refused model.
        record_bytes: of its row of the config `models`.
        columns: that row without the manifest; what it says outranks the record, for the other models decide on
            splits, groups and the outcome of a duplicate.
        family: whose files its windows go to; None where all families share them.
    """

    index: int
    row_bytes: tuple[int, ...]
    record_bytes: int
    columns: Mapping[str, Any]
    family: str | None = None

    @property
    def split(self) -> str:
        return self.columns["split"]


@dataclass(frozen=True)
class ShardTask:
    """What a worker process needs to know; `models` are those of the shard's runs.

    `layer_statistics` are what layers are normalized by; None where they are not.
    """

    shard: Shard
    models: tuple[PlannedModel, ...]
    config: DatasetConfig
    output: Path
    layer_statistics: LayerStatistics | None = None


def plan_shards(models: Sequence[PlannedModel], max_bytes: int) -> list[Shard]:
    """Lays rows out, in the order of the models, into files of at most `max_bytes`, at least one row each."""
    shards = []
    for split in dict.fromkeys(model.split for model in models):
        here = [model for model in models if model.split == split]
        for family in dict.fromkeys(model.family for model in here):
            mine = [model for model in here if model.family == family]
            windows = [(model.index, row, size) for model in mine for row, size in enumerate(model.row_bytes)]
            shards += _shards_of(WINDOWS, split, family, _cut(windows, max_bytes))
        records = [(model.index, 0, model.record_bytes) for model in here]
        shards += _shards_of(MODELS, split, None, _cut(records, max_bytes))
    return shards


def _shards_of(config_name: str, split: str, family: str | None, files: Sequence[tuple[Run, ...]]) -> list[Shard]:
    return [
        Shard(config_name, shard_path(config_name, split, number, len(files), family), runs)
        for number, runs in enumerate(files)
    ]


def _cut(rows: Sequence[tuple[int, int, int]], max_bytes: int) -> list[tuple[Run, ...]]:
    """Cuts rows (model, row of the model, bytes) into files, as runs."""
    room = 0.97 * max_bytes  # Parquet adds a little of its own
    files: list[list[Run]] = []
    held = 0
    for model, row, size in rows:
        if not files or held + size > room:
            files.append([])
            held = 0
        runs = files[-1]
        if runs and runs[-1].model == model:
            runs[-1] = Run(model, runs[-1].first, runs[-1].count + 1)
        else:
            runs.append(Run(model, row, 1))
        held += size
    return [tuple(runs) for runs in files]


def write_shard(task: ShardTask) -> str:
    """Writes one Parquet file under a temporary name, renames it, returns its path; a finished one is left alone."""
    path = task.output / task.shard.path
    if not path.exists():
        with replacing(path, WorkFolder(task.output).temporary) as temporary:
            (_write_windows if task.shard.config_name == WINDOWS else _write_models)(task, temporary)
    return task.shard.path


def _write_windows(task: ShardTask, path: Path) -> None:
    schema = window_schema(task.config.token_size, task.config.dtype)
    with windows_writer(path, schema) as writer:
        for group in _row_groups(task):
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=len(group))


def windows_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of rows of the config `windows`."""
    return pq.ParquetWriter(
        path,
        schema,
        # Real weights in float16 shrink to 0.87; plain Parquet is written only a tenth faster, for the time goes into
        # the nesting of the lists. Byte planes would give 0.81, but not every reader knows them for float16.
        compression="zstd",
        compression_level=1,
        use_dictionary=["model_id"],
        write_statistics=SEARCHABLE,
    )


def _row_groups(task: ShardTask) -> Iterator[list[pa.RecordBatch]]:
    """The rows of a file, grouped; they are views on the mapped parts, unless their layers are normalized here."""
    work, limit, statistics = WorkFolder(task.output), task.config.row_group_bytes, task.layer_statistics
    group: list[pa.RecordBatch] = []
    held = 0
    for run, model in zip(task.shard.runs, task.models, strict=True):
        if statistics is not None:
            manifest = WeightManifest.from_json(work.read_record(run.model).row["manifest"])
        with pa.memory_map(str(work.part(run.model))) as file, pa.ipc.open_file(file) as reader:
            for row in range(run.first, run.first + run.count):
                if group and held + model.row_bytes[row] > limit:
                    yield group
                    group, held = [], 0
                batch = reader.get_batch(row)
                if statistics is not None:
                    batch = normalized_row(batch, manifest, statistics, task.config.dtype)
                group.append(batch)
                held += model.row_bytes[row]
    if group:
        yield group


def _write_models(task: ShardTask, path: Path) -> None:
    schema, work = model_features().arrow_schema, WorkFolder(task.output)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in _batched(task.models, 1000):
            rows = []
            for model in part:
                record = work.read_record(model.index)
                refused = {"manifest": None} if model.split == REFUSED else {}  # a copy's record has one
                rows.append({**record.row, **model.columns, **refused})
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _batched(models: Sequence[PlannedModel], size: int) -> list[Sequence[PlannedModel]]:
    bounds = [*range(0, len(models), size), len(models)]
    return [models[a:b] for a, b in pairwise(bounds)]
