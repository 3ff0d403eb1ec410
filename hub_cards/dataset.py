"""A tokenized dataset for the Hub, without the models whose license does not let others share their weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard

from datasets_scripts.card.composition_figure import FIGURE_FILE, composition_figure
from datasets_scripts.card.dataset_card import Collection, dataset_card
from datasets_scripts.collect.config import CollectConfig
from datasets_scripts.schema import (
    ACCEPTED,
    EXTRACTOR_FILE,
    FORMAT_VERSION,
    MODELS,
    PROPERTIES,
    REPORT_FILE,
    TRAIN,
    WINDOWS,
    WITHHELD,
    WORK_FOLDER,
    splits_by_family,
)
from datasets_scripts.tokenize_config import DatasetConfig, TokenizeConfig
from datasets_scripts.work_folder import finished_run
from hf_wsl.files import write_json, write_text
from modeling_wsl.hub_card import is_ours

from .card_text import CARD_FILE, check_card, is_somebodys, read_card
from .errors import PublishError
from .local_paths import without_local_paths
from .publication import OWN_HERE, OWN_THERE, STAGING, Publication, left_behind, refuse_leftovers, text_files
from .withholding import (
    ShardName,
    Staging,
    find_withheld,
    open_parquet,
    parse_shard,
    read_models,
    shard_names,
    withheld_row,
)


OWNED = (
    *(f"{config}/*.parquet" for config in (WINDOWS, MODELS, PROPERTIES)),
    EXTRACTOR_FILE,
    REPORT_FILE,
    FIGURE_FILE,
)

FRONT_MATTER = "Its front matter gets the files and licenses of what is published; check the figures in its text."


def prepare_dataset(folder: Path, repo_id: str, on_hub: str | None) -> Publication:
    """Checks a tokenized dataset, and rewrites what holds models to be withheld into a hidden folder in it.

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
    windows, models, properties = (shard_names(folder, config) for config in (WINDOWS, MODELS, PROPERTIES))
    order = {model_id: number for number, model_id in enumerate(report["models"])}
    rows = sorted(read_models(folder, models), key=lambda row: order.get(row["model_id"], len(order)))
    check_rows(folder, rows, windows, properties, report)
    withheld = find_withheld(rows)
    if len(withheld) == report["counts"]["accepted"]:
        name, reason = next(iter(withheld.items()))
        raise PublishError(
            f"{folder}: no model's weights may be shared; {name}: {reason}. There is nothing to publish."
        )
    described = DatasetFacts(folder, repo_id, report, rows, withheld)
    files = {name.path: folder / name.path for name in (*windows, *models, *properties)}
    if withheld:
        staging = Staging(folder / STAGING, folder, [*windows, *models, *properties], withheld)
        files = {**staging.windows(windows), **staging.models(models), **staging.properties(properties)}
    texts = {name: folder / name for name in text_files(folder)}
    files = {**texts, **files, EXTRACTOR_FILE: folder / EXTRACTOR_FILE}
    stage_report(described, files)
    card, notes = choose_card(described, [name for path in files if (name := parse_shard(path))], on_hub)
    front = check_card(card, CARD_FILE)
    if not any(row["split"] == TRAIN and row["status"] == ACCEPTED for row in described.kept):
        notes.append("All training models are withheld: nobody can train on what is published.")
    files[CARD_FILE] = folder / STAGING / CARD_FILE
    write_text(files[CARD_FILE], card)
    stated = front.get("license") or ["none stated"]
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


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """What card and report of a dataset are made of.

    Attributes:
        folder: of the dataset.
        repo_id: where it goes.
        report: content of tokenize.json.
        rows: of the config `models`, without manifest, in the order of the run.
        withheld: model_id -> reason.
    """

    folder: Path
    repo_id: str
    report: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    withheld: Mapping[str, str]

    @property
    def kept(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row["model_id"] not in self.withheld]

    def card_there(self, files: Sequence[ShardName]) -> str:
        """README.md of what is published."""
        withheld = [withheld_row(r, self.withheld[r["model_id"]]) for r in self.rows if r["model_id"] in self.withheld]
        return dataset_card(self.kept, withheld=withheld, dataset_id=self.repo_id, **self._card_options(files))

    def _card_options(self, files: Sequence[ShardName]) -> dict[str, Any]:
        collection = self.report.get("collection")
        return {
            "config": run_config(self.report),
            "collected": Collection(**collection) if collection else None,
            "families": splits_by_family((name.family, name.split) for name in files),
            "picture": FIGURE_FILE if (self.folder / FIGURE_FILE).is_file() else None,
            "properties": self.report["settings"].get(PROPERTIES),
        }

    def published_report(self) -> dict[str, Any]:
        """tokenize.json of the published dataset: the counts are those of what is in it."""
        if not self.withheld:
            return without_local_paths(dict(self.report))
        accepted = [row for row in self.kept if row["status"] == ACCEPTED]
        totals = {key: sum(row[key] for row in accepted) for key in ("num_parameters", "num_tokens", "num_windows")}
        entries = totals["num_tokens"] * run_config(self.report).token_size
        counts = {
            "accepted": len(accepted),
            "refused": self.report["counts"]["refused"],
            "withheld": len(self.withheld),
            **totals,
            "padding": 1 - totals["num_parameters"] / entries,
            "tokens_by_split": {
                split: sum(row["num_tokens"] for row in accepted if row["split"] == split)
                for split in self.report["counts"]["tokens_by_split"]
            },
        }
        report = {**self.report, "counts": counts}
        if "outcomes" in report:  # of a collection
            report["outcomes"] = {**report["outcomes"], ACCEPTED: len(accepted), WITHHELD: len(self.withheld)}
        return without_local_paths(report)


def run_config(report: Mapping[str, Any]) -> DatasetConfig:
    """The settings of the run that made a dataset."""
    kind = CollectConfig if "collection" in report else TokenizeConfig
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in report["settings"].items() if name in names})


def check_rows(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    windows: Sequence[ShardName],
    properties: Sequence[ShardName],
    report: Mapping[str, Any],
) -> None:
    """Compares the files with each other and with the report.

    Raises:
        PublishError: models, windows or properties are missing, or there are too many.
    """
    accepted = [row for row in rows if row["status"] == ACCEPTED]
    if not accepted:
        raise PublishError(f"{folder} holds refused models only: there is nothing to publish.")
    promised = sum(row["num_windows"] for row in accepted)
    for what, found, expected in (
        ("models", len(rows), len(report["models"])),
        ("accepted models", len(accepted), report["counts"]["accepted"]),
        ("windows", _count_rows(folder, windows), promised),
        ("rows of properties", _count_rows(folder, properties), len(rows) if PROPERTIES in report["settings"] else 0),
    ):
        if found != expected:
            raise PublishError(
                f"{folder}: {found:,} {what} are there, and {expected:,} should be. Make the dataset anew."
            )
    if not (folder / EXTRACTOR_FILE).is_file():
        raise PublishError(f"{folder} lacks {EXTRACTOR_FILE}: nothing could be tokenized like it. Make it anew.")


def _count_rows(folder: Path, names: Sequence[ShardName]) -> int:
    count = 0
    for name in names:
        with open_parquet(folder / name.path) as file:
            count += file.metadata.num_rows
    return count


def stage_report(facts: DatasetFacts, files: dict[str, Path]) -> None:
    """Adds picture and report to the files: those of the dataset, or others where models are withheld."""
    folder, staging = facts.folder, facts.folder / STAGING
    if (folder / FIGURE_FILE).is_file():
        files[FIGURE_FILE] = folder / FIGURE_FILE
        if facts.withheld:
            files[FIGURE_FILE] = staging / FIGURE_FILE
            composition_figure(facts.kept, staging / FIGURE_FILE)
    published = facts.published_report()
    files[REPORT_FILE] = folder / REPORT_FILE
    if published != facts.report:
        files[REPORT_FILE] = staging / REPORT_FILE
        write_json(staging / REPORT_FILE, published)


def choose_card(facts: DatasetFacts, published: Sequence[ShardName], on_hub: str | None) -> tuple[str, list[str]]:
    """The card to publish, and notes. The text of people's own cards is kept; the front matter must fit the files.

    Args:
        published: files of what is published.
    """
    written = facts.card_there(published)
    own = read_card(facts.folder / CARD_FILE)
    if own is not None and not is_ours(own):
        return with_front_matter_of(own, written), [OWN_HERE, FRONT_MATTER]
    if on_hub is not None and is_somebodys(on_hub):
        return with_front_matter_of(on_hub, written), [OWN_THERE, FRONT_MATTER]
    return written, []


def with_front_matter_of(own: str, written: str) -> str:
    """Somebody's own card, with the files and licenses of the one written now."""
    check_card(own, CARD_FILE)
    card, new = DatasetCard(own), DatasetCard(written)
    card.data.configs, card.data.license = new.data.configs, new.data.license
    return str(card)
