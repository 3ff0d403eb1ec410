"""The state of an unfinished dataset, inside the output folder: what makes a run resumable after a kill at any moment.

`RunFolder` does most of it. A model's part (its windows, as an Arrow file) is there before its record (its row of the
config `models`), all records before the first Parquet file, all files of the dataset before `tokenize.json`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hf_wsl.files import remove_folder, remove_leftovers, sha256
from hf_wsl.run_folder import OVERWRITE, RunFolder, RunFolderError, differences

from .schema import CARD_FILE, EXTRACTOR_FILE, FORMAT_VERSION, MODELS, REPORT_FILE, WORK_FOLDER


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelRecord:
    """All that is known of a model that was dealt with.

    Attributes:
        fingerprint: of the source at the time.
        row: its columns of the config `models`, without split and groups, which depend on the other models.
        near_copy_fingerprint: what near copies are told by (`near_copies.py`); None for a refused model.
        layer_moments: what layers are normalized by (`window_rows.py`); None where they are not.
        canonical_sha256: of a model that near copies cannot be told of: it has no fingerprint.
    """

    fingerprint: str
    row: Mapping[str, Any]
    near_copy_fingerprint: Mapping[str, Any] | None = None
    layer_moments: Mapping[str, Sequence[float]] | None = None
    canonical_sha256: str | None = None


@dataclass(frozen=True)
class WorkFolder(RunFolder):
    """The output folder of a run that makes a dataset, and `.tokenize` in it, where several processes work at once."""

    what: str = "a tokenized dataset"
    state: str = WORK_FOLDER
    report: str = REPORT_FILE

    def part(self, index: int) -> Path:
        """The windows of a model."""
        return self.root / "parts" / f"{index:07d}.arrow"

    def mark(self, key: str) -> Path:
        """The file that holds the index of a model whose weight files have the hash `key`."""
        return self.root / "weight_files" / key

    def read_model(self, index: int) -> ModelRecord | None:
        """The record of a model; None if it has not been dealt with."""
        content = self.read_record(f"{index:07d}")
        return None if content is None else ModelRecord(**content)

    def write_model(self, index: int, record: ModelRecord) -> None:
        self.write_record(f"{index:07d}", asdict(record))

    def model_path(self, index: int) -> Path:
        """The file of a model's record."""
        return self.record(f"{index:07d}")

    def pending(self, fingerprints: Sequence[str]) -> list[int]:
        """The models to deal with, of all: new ones, those that the network kept away, and those that changed.

        Args:
            fingerprints: of the present state of each source, in order. Records of another state are dropped.
        """
        indices = []
        for index, fingerprint in enumerate(fingerprints):
            record = self.read_model(index)
            if record is not None and record.fingerprint != fingerprint:
                logger.warning("%s changed since it was tokenized; it is read again", record.row["model_id"])
                self.forget(f"{index:07d}")
                self.part(index).unlink(missing_ok=True)
                record = None
            if record is None or record.row["outcome"] == "network":
                indices.append(index)
        return indices

    def begin_assembly(self, rows: Mapping[int, Mapping[str, Any]], folders: Sequence[str]) -> None:
        """Removes Parquet files that were assembled from other records or rows than there are now."""
        parts = ((self.model_path(index), json.dumps(dict(row), sort_keys=True)) for index, row in rows.items())
        plan, now = self.root / "plan.json", {"records": sha256(chain.from_iterable(parts))}
        if not plan.is_file() or json.loads(plan.read_text(encoding="utf-8")) != now:
            for folder in folders:
                remove_folder(self.output / folder)
        self.write_json(plan, now)

    def finished(
        self, settings: Mapping[str, Any], fingerprints: Mapping[str, str] | None = None
    ) -> dict[str, Any] | None:
        """The report of an earlier run of the same settings that came to its end; None if there is none.

        One that refused every model is none: its files are removed.

        Args:
            settings: as for `open`, see `run_settings`.
            fingerprints: id -> present state of the sources; None leaves them out of the comparison.

        Raises:
            RunFolderError: the folder holds a finished dataset of other settings or sources (each is named).
        """
        report = finished_run(self.output)
        if report is None:
            return None
        if not report["counts"]["accepted"]:
            logger.info("%s holds refused models only; it is made anew", self.output)
            remove_folder(self.output / MODELS)
            for name in (CARD_FILE, EXTRACTOR_FILE, REPORT_FILE):  # the report, which tells so, last
                (self.output / name).unlink(missing_ok=True)
            return None
        before = {"format": report["format"], "models": list(report["models"]), **report["settings"]}
        changes = differences(before, json.loads(json.dumps(settings)))
        if changed := [m for m, now in (fingerprints or {}).items() if report["models"].get(m, now) != now]:
            listed = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
            changes.append(f"{len(changed)} models changed since ({listed})")
        if changes:
            raise RunFolderError(
                f"{self.output} holds a finished dataset that differs: {'; '.join(changes)}. Name another folder, or "
                f"{OVERWRITE}."
            )
        self.remove_state()  # of a run that was killed between its last file and the end
        remove_leftovers(self.output)
        logger.info("%s is complete; nothing was done", self.output)
        return report


def run_settings(settings: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """All that a run must have in common with one before it, to go on with it or to find it finished."""
    return {"format": FORMAT_VERSION, **settings, "models": list(models)}


def finished_run(output: Path) -> dict[str, Any] | None:
    """The content of `tokenize.json`; None if no run ended in this folder.

    Raises:
        RunFolderError: the file is damaged, or not one of ours.
    """
    report = WorkFolder(output).read_report()
    if report is not None and not {"format", "settings", "models", "counts"} <= set(report):
        raise RunFolderError(f"{output / REPORT_FILE} was not written by this command. Name another folder.")
    return report
