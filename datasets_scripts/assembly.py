"""The second pass: from the parts and records of all models to Parquet files, card and report.

It runs when the hashes, owners and near copies of all models are known, for the splits depend on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets.utils import tqdm

from hf_wsl.files import replacing
from hf_wsl.workers import run_tasks

from .card.composition import FAMILIES
from .card.composition_figure import FIGURE_FILE, composition_figure
from .card.dataset_card import Collection, dataset_card
from .dataset_writer import PlannedModel, ShardTask, plan_shards, write_shard
from .layer_moments import layer_statistics, merge_moments
from .model_part import NOTHING_STORED, feature_extractor
from .model_properties import properties_digest, write_properties
from .near_copies import NearCopyItem, near_copy_groups
from .schema import (
    ACCEPTED,
    CARD_FILE,
    EXTRACTOR_FILE,
    MODELS,
    PROPERTIES,
    REFUSED,
    TEST,
    TRAIN,
    VALIDATION,
    WINDOWS,
    splits_by_family,
)
from .splits import SplitItem, duplicate_groups
from .tokenize_config import DatasetConfig
from .work_folder import WorkFolder


OTHER_FAMILY = "other"


@dataclass
class AssembledModel:
    """One model of the dataset to be.

    Attributes:
        index: of its part and record.
        row: its columns of the config `models` without the manifest, which stays on the disk.
        near_copy_fingerprint: None for a refused model.
        layer_moments: None for a refused model, and where layers are not normalized.
        record_bytes: size of its record.
    """

    index: int
    row: dict[str, Any]
    near_copy_fingerprint: Mapping[str, Any] | None
    record_bytes: int
    layer_moments: Mapping[str, Sequence[float]] | None = None

    @property
    def accepted(self) -> bool:
        return self.row["status"] == ACCEPTED


def read_models(work: WorkFolder, indices: Sequence[int]) -> list[AssembledModel]:
    """The models that were dealt with, without splits and groups."""
    models = []
    for index in indices:
        record = work.read_record(index)
        row = {**record.row, "split": REFUSED, "duplicate_group": None, "near_copy_group": None}
        del row["manifest"]
        size = work.record(index).stat().st_size
        models.append(AssembledModel(index, row, record.near_copy_fingerprint, size, record.layer_moments))
    return models


def find_groups(models: Sequence[AssembledModel]) -> list[SplitItem]:
    """Writes duplicate and near-copy groups into the rows of the accepted models.

    Returns:
        what splits are drawn from, one item an accepted model, in order.
    """
    accepted = [model for model in models if model.accepted]
    near = near_copy_groups(
        [
            NearCopyItem(m.row["model_id"], m.near_copy_fingerprint, m.row["base_model"], m.row["source"])
            for m in accepted
        ]
    )
    items = [
        SplitItem(r["model_id"], r["owner"], r["weights_sha256"], r["num_tokens"], group)
        for r, group in zip((m.row for m in accepted), near, strict=True)
    ]
    for model, copy_of, near_to in zip(accepted, duplicate_groups(items), near, strict=True):
        model.row |= {"duplicate_group": copy_of, "near_copy_group": near_to}
    return items


def write_dataset(
    work: WorkFolder,
    models: Sequence[AssembledModel],
    config: DatasetConfig,
    *,
    worker_module: str,
    collected: Collection | None = None,
    properties: pa.Table | None = None,
) -> None:
    """Writes the Parquet files, the feature extractor's settings, the picture and the card; files there are kept.

    Args:
        work: of the run; its records must not change from here on.
        models: with splits and groups in their rows; those that no layer-wise normalization fits become refused.
        config: of the run.
        worker_module: what the worker processes import first.
        collected: how the models were found on the Hub, for the card.
        properties: of the config `properties`, a row a model; None: no such config.
    """
    statistics = _fit_layers(models) if config.layer_normalization else None
    planned = [_planned(model, config) for model in models]
    rows = [model.row for model in models]
    work.begin_assembly([model.index for model in models], rows, (WINDOWS, MODELS, PROPERTIES))
    by_index = {model.index: model for model in planned}
    tasks = [
        ShardTask(shard, tuple(by_index[run.model] for run in shard.runs), config, work.output, statistics)
        for shard in plan_shards(planned, config.shard_bytes)
    ]
    with tqdm(total=len(tasks), desc="Assembling", unit="file") as bar:
        for _ in run_tasks(write_shard, tasks, config.num_workers, worker_module):
            bar.update()
    if properties is not None:
        write_properties(work, rows, properties)
    # Not save_pretrained: it adds the library's code, which a dataset has no use for.
    work.write_text(work.output / EXTRACTOR_FILE, feature_extractor(config, statistics).to_json_string())
    picture = None
    if any(model.accepted for model in models):
        with replacing(work.output / FIGURE_FILE, work.temporary) as temporary:
            composition_figure(rows, temporary)
        picture = FIGURE_FILE
    card = dataset_card(
        rows,
        config,
        collected=collected,
        families=splits_by_family((model.family, model.split) for model in planned),
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
            outcome = {"status": REFUSED, "outcome": "other_layers", "split": REFUSED, "reason": reason}
            model.row |= {**NOTHING_STORED, **outcome}
    return statistics


def _planned(model: AssembledModel, config: DatasetConfig) -> PlannedModel:
    row = model.row
    starts = range(0, row["num_tokens"] if model.accepted else 0, config.window_size)
    sizes = tuple(min(config.window_size, row["num_tokens"] - start) * config.token_bytes for start in starts)
    family = file_family(row["family"]) if config.split_files_by_family and model.accepted else None
    return PlannedModel(model.index, sizes, model.record_bytes, row, family)


def file_family(family: str | None) -> str:
    """The family whose files a model's windows go to: names that a list of models made up share those of "other"."""
    return family if family in FAMILIES else OTHER_FAMILY


def counts(models: Sequence[AssembledModel], config: DatasetConfig) -> dict[str, Any]:
    """Totals of the accepted models, for the report."""
    accepted = [model.row for model in models if model.accepted]
    totals = {key: sum(row[key] for row in accepted) for key in ("num_parameters", "num_tokens", "num_windows")}
    splits = [TRAIN, VALIDATION] + [TEST] * any(row["split"] == TEST for row in accepted)
    by_split = {s: sum(row["num_tokens"] for row in accepted if row["split"] == s) for s in splits}
    padding = 1 - totals["num_parameters"] / (totals["num_tokens"] * config.token_size) if accepted else 0.0
    refused = len(models) - len(accepted)
    return {"accepted": len(accepted), "refused": refused, **totals, "padding": padding, "tokens_by_split": by_split}
