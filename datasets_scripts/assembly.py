"""The second pass: from the parts and records of all models to Parquet files, card and report.

It runs when the hashes, owners and near copies of all models are known, for the splits depend on them. Which rows go
into which file is settled before any is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.utils import tqdm

from hf_wsl.workers import run_tasks
from modeling_wsl.checkpoints.errors import shorten
from modeling_wsl.tokens.layer_normalization import LayerStatistics
from modeling_wsl.tokens.manifest import WeightManifest

from .card.architectures import FAMILIES
from .card.composition import FIGURE_FILE, composition_figure
from .card.dataset_card import Collection, dataset_card
from .licenses import withheld_models
from .model_task import NOTHING_STORED, feature_extractor
from .near_copies import NearCopyItem, near_copy_groups
from .schema import (
    ACCEPTED,
    CARD_FILE,
    EXTRACTOR_FILE,
    FORMAT_VERSION,
    MODELS,
    PROPERTIES,
    REFUSED,
    TEST,
    TRAIN,
    VALIDATION,
    WINDOWS,
    model_features,
    shard_path,
    splits_by_family,
)
from .splits import SplitItem, duplicate_groups, properties_digest
from .tokenize_config import DatasetConfig, TokenizeError
from .window_rows import layer_statistics, merge_moments, normalized_row, window_schema, windows_writer
from .work_folder import WorkFolder


OTHER_FAMILY = "other"
MODELS_AT_ONCE = 1000  # rows of the config `models` in memory: manifests are large


@dataclass(frozen=True)
class DatasetReport:
    """A dataset that a run made, in numbers.

    Attributes:
        output: the dataset's folder.
        already_complete: an earlier run had made it; nothing was written.
        outcomes: code of `outcomes.OUTCOMES` -> models, each once.
        accepted, refused: numbers of models.
        num_parameters, num_tokens, num_windows: of the accepted ones.
        padding: share of all token entries that hold no weight.
        tokens_by_split: e.g. `{"train": 110_000, "validation": 27_000}`.
    """

    output: Path
    already_complete: bool
    outcomes: Mapping[str, int]
    accepted: int
    refused: int
    num_parameters: int
    num_tokens: int
    num_windows: int
    padding: float
    tokens_by_split: Mapping[str, int]

    def numbers(self) -> dict[str, Any]:
        """All fields but the first two, which say nothing of the dataset, for reports in JSON."""
        return {name: value for name, value in asdict(self).items() if name not in ("output", "already_complete")}


@dataclass
class AssembledModel:
    """One model of the dataset to be.

    Attributes:
        index: of its part and record.
        fingerprint: of its source.
        row: its columns of the config `models` without the manifest, which stays on the disk; it outranks the record,
            for the other models decide on splits, groups and the outcome of a duplicate.
        near_copy_fingerprint: None for a refused model.
        layer_moments: None for a refused model, and where layers are not normalized.
        record_bytes: size of its record.
        canonical_sha256: see `ModelRecord`.
    """

    index: int
    fingerprint: str
    row: dict[str, Any]
    near_copy_fingerprint: Mapping[str, Any] | None
    layer_moments: Mapping[str, Sequence[float]] | None
    record_bytes: int
    canonical_sha256: str | None = None

    @property
    def accepted(self) -> bool:
        return self.row["status"] == ACCEPTED

    def refuse(self, outcome: str, reason: str) -> None:
        """Makes an accepted model a refused one."""
        self.row |= {**NOTHING_STORED, "status": REFUSED, "outcome": outcome, "split": REFUSED, "reason": reason}


def read_models(work: WorkFolder, indices: Sequence[int]) -> list[AssembledModel]:
    """The models that were dealt with, without splits and groups."""
    models = []
    for index in indices:
        record = work.read_model(index)
        row = {**record.row, "split": REFUSED, "duplicate_group": None, "near_copy_group": None}
        del row["manifest"]
        size = work.model_path(index).stat().st_size
        moments = record.layer_moments
        models.append(
            AssembledModel(
                index, record.fingerprint, row, record.near_copy_fingerprint, moments, size, record.canonical_sha256
            )
        )
    return models


def draw_splits(models: Sequence[AssembledModel], draw: Callable[[Sequence[SplitItem]], Sequence[str]]) -> list[str]:
    """Writes groups and splits into the rows of the accepted models.

    Args:
        models: of the dataset.
        draw: gives the split of each accepted model, in order.

    Returns:
        these splits.
    """
    accepted = [model for model in models if model.accepted]
    near = near_copy_groups(
        [
            NearCopyItem(m.row["model_id"], m.near_copy_fingerprint, m.row["base_model"], m.row["source"])
            for m in accepted
        ]
    )
    items = [
        SplitItem(r["model_id"], r["owner"], r["weights_sha256"], r["num_tokens"], group, model.canonical_sha256)
        for model, r, group in zip(accepted, (m.row for m in accepted), near, strict=True)
    ]
    splits = list(draw(items))
    for model, copy_of, near_to, split in zip(accepted, duplicate_groups(items), near, splits, strict=True):
        model.row |= {"duplicate_group": copy_of, "near_copy_group": near_to, "split": split}
    return splits


def finish_dataset(
    work: WorkFolder,
    models: Sequence[AssembledModel],
    config: DatasetConfig,
    settings: Mapping[str, Any],
    *,
    collected: Collection | None = None,
    properties: pa.Table | None = None,
) -> DatasetReport:
    """Writes the dataset; files that are there are kept. The last one, the report, makes it a finished one.

    Args:
        work: of the run; its records must not change from here on.
        models: with splits and groups in their rows; those that no layer-wise normalization fits become refused.
        config: of the run.
        settings: all that a run must have in common with this one, to find it finished.
        collected: how the models were listed on the Hub.
        properties: of the config `properties`, a row a model; None: no such config.

    Raises:
        TokenizeError: no model was accepted; the dataset is there, and lists all of them with the reasons.
        OSError: the output cannot be written.
    """
    withheld = withheld_models(model.row for model in models if model.accepted)  # copies of what is, too
    for model in models:
        model.row["redistributable"] = model.row["redistributable"] and model.row["model_id"] not in withheld
    write_dataset(work, models, config, collected=collected, properties=properties)
    outcomes = {}
    for model in models:
        outcomes[model.row["outcome"]] = outcomes.get(model.row["outcome"], 0) + 1
    report = {
        "format": FORMAT_VERSION,
        "counts": counts(models, config),
        "outcomes": outcomes,
        **({"collection": asdict(collected)} if collected else {}),
        "settings": settings,
        "models": {model.row["model_id"]: model.fingerprint for model in models},
    }
    work.finish(report)
    work.remove_state()
    if not report["counts"]["accepted"]:
        table = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        first = "; ".join(f"{m.row['model_id']} {shorten(m.row['reason'])}" for m in models[:3])
        raise TokenizeError(
            f"None of the {len(models)} models was accepted: {table}. The first: {first}. {work.output} lists all of "
            "them with the reasons: config `models`, split `refused`. Run it again with other models or settings."
        )
    return dataset_report(work.output, report, already_complete=False)


def dataset_report(output: Path, report: Mapping[str, Any], *, already_complete: bool) -> DatasetReport:
    """The report of a run from the content of its `tokenize.json`."""
    return DatasetReport(output, already_complete, report["outcomes"], **report["counts"])


def write_dataset(
    work: WorkFolder,
    models: Sequence[AssembledModel],
    config: DatasetConfig,
    *,
    collected: Collection | None = None,
    properties: pa.Table | None = None,
) -> None:
    """Writes the Parquet files, the feature extractor's settings, the picture and the card; see `finish_dataset`."""
    statistics = _fit_layers(models) if config.layer_normalization else None
    rows = {model.index: model.row for model in models}
    work.begin_assembly(rows, (WINDOWS, MODELS, PROPERTIES))
    tasks = [
        ShardTask(shard, tuple(rows[run.model] for run in shard.runs), config, work.output, statistics)
        for shard in plan_shards(models, config)
    ]
    with tqdm(total=len(tasks), desc="Assembling", unit="file") as bar:
        for _ in run_tasks(write_shard, tasks, config.num_workers, __name__):
            bar.update()
    rows = list(rows.values())
    if properties is not None:
        _write_properties(work, rows, properties)
    # Not save_pretrained: it adds the library's code, which a dataset has no use for.
    work.write_text(work.output / EXTRACTOR_FILE, feature_extractor(config, statistics).to_json_string())
    picture = None
    if any(model.accepted for model in models):
        with work.replacing(work.output / FIGURE_FILE) as temporary:
            composition_figure(rows, temporary)
        picture = FIGURE_FILE
    card = dataset_card(
        rows,
        config,
        collected=collected,
        families=splits_by_family((_file_family(model, config), model.row["split"]) for model in models),
        picture=picture,
        properties=None if properties is None else properties_digest(properties),
    )
    work.write_text(work.output / CARD_FILE, card)


def _fit_layers(models: Sequence[AssembledModel]) -> dict[str, list[float]]:
    """Mean and deviation of every layer over the training models; refuses the others that have further layers."""
    accepted = [model for model in models if model.accepted]
    statistics = layer_statistics(merge_moments(m.layer_moments for m in accepted if m.row["split"] == TRAIN))
    for model in accepted:
        if unknown := [name for name in model.layer_moments if name not in statistics]:
            reason = f"has layers that no training model has, {len(unknown)} in all, the first: {unknown[0]!r}."
            model.refuse("other_layers", reason)
    return statistics


def _file_family(model: AssembledModel, config: DatasetConfig) -> str | None:
    """The family whose files a model's windows go to; None where all share them.

    Names that a list of models made up share the files of "other".
    """
    if not config.split_files_by_family or not model.accepted:
        return None
    return model.row["family"] if model.row["family"] in FAMILIES else OTHER_FAMILY


def counts(models: Sequence[AssembledModel], config: DatasetConfig) -> dict[str, Any]:
    """Totals of the accepted models, for the report."""
    accepted = [model.row for model in models if model.accepted]
    totals = {key: sum(row[key] for row in accepted) for key in ("num_parameters", "num_tokens", "num_windows")}
    splits = [TRAIN, VALIDATION] + [TEST] * any(row["split"] == TEST for row in accepted)
    by_split = {s: sum(row["num_tokens"] for row in accepted if row["split"] == s) for s in splits}
    padding = 1 - totals["num_parameters"] / (totals["num_tokens"] * config.token_size) if accepted else 0.0
    refused = len(models) - len(accepted)
    return {"accepted": len(accepted), "refused": refused, **totals, "padding": padding, "tokens_by_split": by_split}


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
class ShardTask:
    """One file to write, for a worker process.

    Attributes:
        shard: the file.
        rows: of the config `models`, without manifests, one a run of the shard.
        config, output: of the run.
        layer_statistics: what layers are normalized by; None where they are not.
    """

    shard: Shard
    rows: tuple[Mapping[str, Any], ...]
    config: DatasetConfig
    output: Path
    layer_statistics: LayerStatistics | None = None


def plan_shards(models: Sequence[AssembledModel], config: DatasetConfig) -> list[Shard]:
    """Lays rows out, in the order of the models, into files of at most `max_shard_size`, at least one row each."""
    shards = []
    for split in dict.fromkeys(model.row["split"] for model in models):
        here = [model for model in models if model.row["split"] == split]
        windows: dict[tuple[str | None, bool], list[tuple[int, int, int]]] = {}
        for model in here:
            rows = windows.setdefault((_file_family(model, config), not model.row["redistributable"]), [])
            rows += [(model.index, number, size) for number, size in enumerate(_window_bytes(model.row, config))]
        for (family, local), rows in windows.items():
            files = _cut(rows, config.shard_bytes)
            for number, runs in enumerate(files):
                shards.append(Shard(WINDOWS, shard_path(WINDOWS, split, number, len(files), family, local), runs))
        files = _cut([(model.index, 0, model.record_bytes) for model in here], config.shard_bytes)
        for number, runs in enumerate(files):
            shards.append(Shard(MODELS, shard_path(MODELS, split, number, len(files)), runs))
    return shards


def _window_bytes(row: Mapping[str, Any], config: DatasetConfig) -> list[int]:
    """Payload of each window of a model; none of a refused one."""
    starts = range(0, row["num_tokens"], config.window_size)
    return [min(config.window_size, row["num_tokens"] - start) * config.token_bytes for start in starts]


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
        with WorkFolder(task.output).replacing(path) as temporary:
            (_write_windows if task.shard.config_name == WINDOWS else _write_models)(task, temporary)
    return task.shard.path


def _write_windows(task: ShardTask, path: Path) -> None:
    schema = window_schema(task.config.token_size, task.config.dtype)
    with windows_writer(path, schema) as writer:
        for group in _row_groups(task):
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=len(group))


def _row_groups(task: ShardTask) -> Iterator[list[pa.RecordBatch]]:
    """The rows of a file, grouped; they are views on the mapped parts, unless their layers are normalized here."""
    work, limit, statistics = WorkFolder(task.output), task.config.row_group_bytes, task.layer_statistics
    group: list[pa.RecordBatch] = []
    held = 0
    for run, columns in zip(task.shard.runs, task.rows, strict=True):
        sizes = _window_bytes(columns, task.config)
        if statistics is not None:
            manifest = WeightManifest.from_json(work.read_model(run.model).row["manifest"])
        with pa.memory_map(str(work.part(run.model))) as file, pa.ipc.open_file(file) as reader:
            for row in range(run.first, run.first + run.count):
                if group and held + sizes[row] > limit:
                    yield group
                    group, held = [], 0
                batch = reader.get_batch(row)
                if statistics is not None:
                    batch = normalized_row(batch, manifest, statistics, task.config.dtype)
                group.append(batch)
                held += sizes[row]
    if group:
        yield group


def _write_models(task: ShardTask, path: Path) -> None:
    schema, work = model_features().arrow_schema, WorkFolder(task.output)
    models = list(zip(task.shard.runs, task.rows, strict=True))
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(models), MODELS_AT_ONCE):
            rows = []
            for run, columns in models[start : start + MODELS_AT_ONCE]:
                rows.append({**work.read_model(run.model).row, **columns})
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _write_properties(work: WorkFolder, rows: Sequence[Mapping[str, Any]], properties: pa.Table) -> None:
    """One Parquet file a split, its rows in the order of those of the config `models`; files there are kept."""
    for split in dict.fromkeys(row["split"] for row in rows):
        path = work.output / shard_path(PROPERTIES, split, 0, 1)
        if path.exists():
            continue
        wanted = pa.array([row["model_id"] for row in rows if row["split"] == split])
        with work.replacing(path) as temporary:
            table = properties.take(pc.index_in(wanted, properties["model_id"]))
            pq.write_table(
                table.replace_schema_metadata(None), temporary, compression="zstd", write_page_checksum=True
            )
