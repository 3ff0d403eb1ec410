"""From the parts of all models to Parquet files. Which rows go into which file is settled before any is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .files import replacing
from .schema import MODELS, WINDOWS, model_features, shard_path
from .tokenize_config import TokenizeConfig
from .window_rows import window_schema
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
        split: which split it goes to.
        row_bytes: of each of its windows; empty for a refused model.
        record_bytes: of its row of the config `models`.
        duplicate_group: None for a refused model.
    """

    index: int
    split: str
    row_bytes: tuple[int, ...]
    record_bytes: int
    duplicate_group: str | None


@dataclass(frozen=True)
class ShardTask:
    """What a worker process needs to know; `models` are those of the shard's runs."""

    shard: Shard
    models: tuple[PlannedModel, ...]
    config: TokenizeConfig
    output: Path


def plan_shards(models: Sequence[PlannedModel], max_bytes: int) -> list[Shard]:
    """Lays rows out, in the order of the models, into files of at most `max_bytes`, at least one row each."""
    shards = []
    for split in dict.fromkeys(model.split for model in models):
        here = [model for model in models if model.split == split]
        windows = [(model.index, row, size) for model in here for row, size in enumerate(model.row_bytes)]
        records = [(model.index, 0, model.record_bytes) for model in here]
        for config_name, rows in ((WINDOWS, windows), (MODELS, records)):
            files = _cut(rows, max_bytes)
            paths = [shard_path(config_name, split, number, len(files)) for number in range(len(files))]
            shards += [Shard(config_name, path, runs) for path, runs in zip(paths, files, strict=True)]
    return shards


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
    writer = pq.ParquetWriter(
        path,
        schema,
        # Real weights in float16 shrink to 0.87; plain Parquet is written only a tenth faster, for the time goes into
        # the nesting of the lists. Byte planes would give 0.81, but not every reader knows them for float16.
        compression="zstd",
        compression_level=1,
        use_dictionary=["model_id"],
        write_statistics=SEARCHABLE,
    )
    with writer:
        for group in _row_groups(task):
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=len(group))


def _row_groups(task: ShardTask) -> Iterator[list[pa.RecordBatch]]:
    """The rows of a file, grouped; they are views on the mapped parts."""
    work, limit = WorkFolder(task.output), task.config.row_group_bytes
    group: list[pa.RecordBatch] = []
    held = 0
    for run, model in zip(task.shard.runs, task.models, strict=True):
        with pa.memory_map(str(work.part(run.model))) as file, pa.ipc.open_file(file) as reader:
            for row in range(run.first, run.first + run.count):
                if group and held + model.row_bytes[row] > limit:
                    yield group
                    group, held = [], 0
                group.append(reader.get_batch(row))
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
                rows.append({**record.row, "split": model.split, "duplicate_group": model.duplicate_group})
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _batched(models: Sequence[PlannedModel], size: int) -> list[Sequence[PlannedModel]]:
    bounds = [*range(0, len(models), size), len(models)]
    return [models[a:b] for a, b in pairwise(bounds)]
