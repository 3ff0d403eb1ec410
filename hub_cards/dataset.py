"""A tokenized dataset for the Hub, without the windows of models whose license does not let others share them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard

from datasets_scripts.card.composition import FIGURE_FILE, composition_figure
from datasets_scripts.card.dataset_card import Collection, dataset_card
from datasets_scripts.collect.config import CollectConfig
from datasets_scripts.licenses import refusal_reason, withheld_models
from datasets_scripts.schema import (
    ACCEPTED,
    CARD_FILE,
    EXTRACTOR_FILE,
    FORMAT_VERSION,
    LOCAL,
    MODELS,
    PROPERTIES,
    REPORT_FILE,
    TRAIN,
    WINDOWS,
    WITHHELD,
    WORK_FOLDER,
    model_features,
    splits_by_family,
)
from datasets_scripts.tokenize_config import DatasetConfig, TokenizeConfig
from datasets_scripts.work_folder import finished_run
from hf_wsl.files import write_json, write_text

from .cards import check_card, choose_card, without_local_paths
from .errors import PublishError
from .publication import STAGING, Publication, left_behind, refuse_leftovers, text_files


OWNED = (
    *(f"{config}/*.parquet" for config in (WINDOWS, MODELS, PROPERTIES)),
    EXTRACTOR_FILE,
    REPORT_FILE,
    FIGURE_FILE,
)
FRONT_MATTER = "Its front matter gets the files and licenses of what is published; check the figures in its text."
SHARD = re.compile(rf"([a-z]+)(?:-(?!{LOCAL}-)(.+?))?(-{LOCAL})?-(\d{{5}})-of-(\d{{5}})\.parquet")
Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A Parquet file of a dataset, told from its name; `path` is relative to the dataset."""

    path: str
    split: str
    family: str | None
    local: bool
    index: int
    count: int


def prepare_dataset(folder: Path, repo_id: str, on_hub: str | None) -> Publication:
    """Checks a tokenized dataset; the files of windows that must not be passed on stay here.

    Args:
        folder: output of `hf-wsl tokenize` or `hf-wsl collect`.
        repo_id: where it goes.
        on_hub: README.md of the repository, None where it has none.

    Raises:
        PublishError: the run has not ended, files are missing or damaged, or no model may be shared.
    """
    refuse_leftovers(folder, (WORK_FOLDER,), "Run the same command again to finish it.")
    report = finished_run(folder)
    if report["format"] != FORMAT_VERSION:
        raise PublishError(
            f"{folder} is of format {report['format']}, this version writes {FORMAT_VERSION}. Make the dataset anew."
        )
    windows, models, properties = (find_shards(folder, config) for config in (WINDOWS, MODELS, PROPERTIES))
    windows = [shard for shard in windows if not shard.local]
    order = {model_id: number for number, model_id in enumerate(report["models"])}
    rows = sorted(read_models(folder, models), key=lambda row: order.get(row["model_id"], len(order)))
    withheld = find_withheld(rows)
    if withheld and len(withheld) == report["counts"]["accepted"]:
        name, reason = next(iter(withheld.items()))
        raise PublishError(
            f"{folder}: no model's weights may be shared; {name}: {reason}. There is nothing to publish."
        )
    check_rows(folder, rows, withheld, windows, properties, report)
    kept = [row for row in rows if row["model_id"] not in withheld]
    files = {name: folder / name for name in text_files(folder)}
    files |= {shard.path: folder / shard.path for shard in (*windows, *models, *properties)}
    files |= {name: folder / name for name in (EXTRACTOR_FILE, REPORT_FILE)}
    published = published_report(report, kept, withheld)
    if published != report:
        files[REPORT_FILE] = folder / STAGING / REPORT_FILE
        write_json(files[REPORT_FILE], published)
    picture = FIGURE_FILE if (folder / FIGURE_FILE).is_file() else None
    if picture:
        files[picture] = folder / picture
        if withheld:
            files[picture] = folder / STAGING / picture
            composition_figure(kept, files[picture])
    written = dataset_card(
        rows,
        run_config(report),
        collected=Collection(**report["collection"]) if report.get("collection") else None,
        withheld=withheld,
        families=splits_by_family((shard.family, shard.split) for shard in windows),
        picture=picture,
        properties=report["settings"].get(PROPERTIES),
        dataset_id=repo_id,
    )
    card, notes, _ = choose_card(folder, written, on_hub)
    if card != written:
        card, notes = with_front_matter_of(card, written), [*notes, FRONT_MATTER]
    if not any(row["split"] == TRAIN and row["status"] == ACCEPTED for row in kept):
        notes.append("All training models are withheld: nobody can train on what is published.")
    files[CARD_FILE] = folder / STAGING / CARD_FILE
    write_text(files[CARD_FILE], card)
    stated = check_card(card, CARD_FILE).get("license") or ["none stated"]
    return Publication(
        folder=folder,
        kind="tokenized dataset",
        repo_type="dataset",
        files=files,
        owned=OWNED,
        license=", ".join([stated] if isinstance(stated, str) else stated),
        withheld=withheld,
        left=left_behind(folder, files),
        notes=tuple(notes),
    )


def find_shards(folder: Path, config_name: str) -> list[Shard]:
    """The files of a config, in order.

    Raises:
        PublishError: a file of another name, or one missing of those that the names promise.
    """
    groups: dict[str, list[Shard]] = {}
    for path in sorted((folder / config_name).glob("*")):
        match = SHARD.fullmatch(path.name)
        if match is None:
            raise PublishError(f"{path} is none of the dataset's files. Move it away.")
        split, family, local, index, count = match.groups()
        shard = Shard(f"{config_name}/{path.name}", split, family, local is not None, int(index), int(count))
        groups.setdefault(shard.path[: -len("-00000-of-00000.parquet")], []).append(shard)
    for name, group in groups.items():
        if [shard.index for shard in group] != list(range(group[0].count)):
            raise PublishError(
                f"{folder}: of {name}-*.parquet {len(group)} of {group[0].count} files are there. Make the dataset "
                "anew."
            )
    return [shard for group in groups.values() for shard in group]


def read_models(folder: Path, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """The rows of the config `models` without the manifest, file by file.

    Raises:
        PublishError: a file is damaged, or of another version of the format.
    """
    columns = [name for name in model_features() if name != "manifest"]
    rows = []
    for file in open_shards(folder, shards):
        if missing := set(columns) - set(file.schema_arrow.names):
            raise PublishError(
                f"{folder}: the config {MODELS} lacks the columns {', '.join(sorted(missing))}: another version of "
                "hf-wsl wrote it. Make the dataset anew."
            )
        for group in range(file.num_row_groups):
            rows += file.read_row_group(group, columns=columns).to_pylist()
    return rows


def open_shards(folder: Path, shards: Sequence[Shard]) -> Iterator[pq.ParquetFile]:
    """Opens Parquet files one after the other; the footer of each tells whether it is complete.

    Raises:
        PublishError: it is not.
    """
    for shard in shards:
        try:
            file = pq.ParquetFile(folder / shard.path)
        except (pa.ArrowException, OSError) as error:
            said = " ".join(str(error).split())
            raise PublishError(f"{folder / shard.path} is damaged ({said}). Make the dataset anew.") from error
        with file:
            yield file


def find_withheld(rows: Rows) -> dict[str, str]:
    """The models that stay here, as was decided when they were tokenized: model_id -> reason."""
    accepted = [row for row in rows if row["status"] == ACCEPTED]
    reasons = withheld_models(accepted)
    return {
        row["model_id"]: reasons.get(row["model_id"]) or refusal_reason(row["license"])
        for row in accepted
        if not row["redistributable"] or row["model_id"] in reasons
    }


def check_rows(
    folder: Path,
    rows: Rows,
    withheld: Mapping[str, str],
    windows: Sequence[Shard],
    properties: Sequence[Shard],
    report: Mapping[str, Any],
) -> None:
    """Compares the files with each other and with the report, and looks for windows that must not be passed on.

    Raises:
        PublishError: models, windows or properties are missing, there are too many, or windows of a withheld model
            lie in a file that would be published.
    """
    accepted = [row for row in rows if row["status"] == ACCEPTED]
    if not accepted:
        raise PublishError(f"{folder} holds refused models only: there is nothing to publish.")
    num_windows, kept = 0, pa.array([row["model_id"] for row in accepted if row["model_id"] not in withheld])
    for file in open_shards(folder, windows):
        num_windows += file.metadata.num_rows
        for group in range(file.num_row_groups):
            names = file.read_row_group(group, columns=["model_id"])["model_id"]
            if not pc.all(pc.is_in(names, value_set=kept)).as_py():
                raise PublishError(
                    f"{folder}: a file of {WINDOWS} without `-{LOCAL}-` in its name holds windows of a model that "
                    "must not be passed on. Make the dataset anew."
                )
    num_properties = sum(file.metadata.num_rows for file in open_shards(folder, properties))
    promised = sum(row["num_windows"] for row in accepted if row["model_id"] not in withheld)
    for what, there, expected in (
        ("models", len(rows), len(report["models"])),
        ("accepted models", len(accepted), report["counts"]["accepted"]),
        ("windows", num_windows, promised),
        ("rows of properties", num_properties, len(rows) if PROPERTIES in report["settings"] else 0),
    ):
        if there != expected:
            raise PublishError(
                f"{folder}: {there:,} {what} are there, and {expected:,} should be. Make the dataset anew."
            )
    if not (folder / EXTRACTOR_FILE).is_file():
        raise PublishError(f"{folder} lacks {EXTRACTOR_FILE}: nothing could be tokenized like it. Make it anew.")


def published_report(report: Mapping[str, Any], kept: Rows, withheld: Mapping[str, str]) -> dict[str, Any]:
    """The content of tokenize.json of the published dataset: the counts are those of what is in it."""
    if not withheld:
        return without_local_paths(dict(report))
    accepted = [row for row in kept if row["status"] == ACCEPTED]
    totals = {key: sum(row[key] for row in accepted) for key in ("num_parameters", "num_tokens", "num_windows")}
    counts = {
        "accepted": len(accepted),
        "refused": report["counts"]["refused"],
        WITHHELD: len(withheld),
        **totals,
        "padding": 1 - totals["num_parameters"] / (totals["num_tokens"] * run_config(report).token_size),
        "tokens_by_split": {
            split: sum(row["num_tokens"] for row in accepted if row["split"] == split)
            for split in report["counts"]["tokens_by_split"]
        },
    }
    outcomes = {**report.get("outcomes", {}), ACCEPTED: len(accepted), WITHHELD: len(withheld)}
    return without_local_paths({**report, "counts": counts, "outcomes": outcomes})


def run_config(report: Mapping[str, Any]) -> DatasetConfig:
    """The settings of the run that made a dataset."""
    kind = CollectConfig if "collection" in report else TokenizeConfig
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in report["settings"].items() if name in names})


def with_front_matter_of(own: str, written: str) -> str:
    """Somebody's own card, with the files and licenses of the one written now."""
    check_card(own, CARD_FILE)
    card, new = DatasetCard(own), DatasetCard(written)
    card.data.configs, card.data.license = new.data.configs, new.data.license
    return str(card)
