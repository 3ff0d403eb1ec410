"""The state of an unfinished run, inside the output folder: what makes it resumable after a kill at any moment.

Every file appears under its final name by a rename, after all that it speaks of: a model's part (its windows, as an
Arrow file) before its record (its row of the config `models`), all records before the first Parquet file. So a file
that is there is whole. Killing a process loses nothing that was renamed; files are not flushed to the disk one by one,
so after a power failure the folder is best deleted.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_wsl.files import write_json, write_text

from .schema import CARD_FILE, EXTRACTOR_FILE, FORMAT_VERSION, MODELS, REPORT_FILE, WORK_FOLDER
from .sources import ModelSource
from .tokenize_config import TokenizeError


@dataclass(frozen=True)
class ModelRecord:
    """What is known of a model that was dealt with.

    Attributes:
        fingerprint: of the source at the time.
        row: its columns of the config `models`, without split and groups, which depend on the other models.
        near_copy_fingerprint: what near copies are found by (`near_copies.py`); None for a refused model.
        layer_moments: what layers are normalized by (`layer_moments.py`); None where they are not.
    """

    fingerprint: str
    row: Mapping[str, Any]
    near_copy_fingerprint: Mapping[str, Any] | None = None
    layer_moments: Mapping[str, Sequence[float]] | None = None


class WorkFolder:
    """Paths and checks of `<output>/.tokenize`; safe to use from several processes, one a model."""

    def __init__(self, output: Path):
        self.output = output
        self.root = output / WORK_FOLDER
        self.temporary = self.root / "temporary"
        self._parts, self._records = self.root / "parts", self.root / "records"
        self._settings, self._plan = self.root / "settings.json", self.root / "plan.json"

    def part(self, index: int) -> Path:
        return self._parts / f"{index:07d}.arrow"

    def record(self, index: int) -> Path:
        return self._records / f"{index:07d}.json"

    def mark(self, key: str) -> Path:
        """The file that holds the index of a model whose weight files have the hash `key`."""
        return self.root / "weight_files" / key

    @contextmanager
    def open(self, settings: Mapping[str, Any], models: Sequence[ModelSource]) -> Iterator[None]:
        """Begins a run, or resumes one of the same settings and sources; no other process can until it ends.

        Raises:
            TokenizeError: another run is writing here; the folder holds other files, or an unfinished run with other
                settings or sources (each is named).
        """
        if not self._settings.is_file() and self.output.is_dir():
            foreign = sorted(p.name for p in self.output.iterdir() if p.name != WORK_FOLDER)
            if foreign:
                raise TokenizeError(
                    f"{self.output} holds other files ({', '.join(foreign[:3])}). Name a new or an empty folder."
                )
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise TokenizeError(
                f"{self.output}: another run is writing here. Wait for it, or name another."
            ) from error
        try:  # the lock is the process': one that is killed lets go of it
            self._begin(settings, models)
            yield
        finally:
            lock.release()

    def check_same(self, settings: Mapping[str, Any], models: Sequence[ModelSource]) -> None:
        """Compares an unfinished run with one of these settings and sources; touches nothing that it works on.

        Raises:
            TokenizeError: they differ.
        """
        before = json.loads(self._settings.read_text(encoding="utf-8"))
        if differences := compare_runs(before, self._state(settings, models)):
            raise TokenizeError(
                f"{self.output} holds an unfinished run that differs: {differences}. Name the same sources and "
                f"settings to resume it, or another folder; or delete {self.output} to begin anew."
            )

    @staticmethod
    def _state(settings: Mapping[str, Any], models: Sequence[ModelSource]) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, "settings": dict(settings), "models": [m.model_id for m in models]}

    def _begin(self, settings: Mapping[str, Any], models: Sequence[ModelSource]) -> None:
        if self._settings.is_file():
            self.check_same(settings, models)
        else:  # what is left of a run that was killed while it removed this folder
            for folder in (self._parts, self._records):
                shutil.rmtree(folder, ignore_errors=True)
            self._plan.unlink(missing_ok=True)
        for folder in (self._parts, self._records):
            folder.mkdir(exist_ok=True)
        shutil.rmtree(self.temporary, ignore_errors=True)  # of a run that was killed
        self.temporary.mkdir()
        if not self._settings.is_file():
            self.write_json(self._settings, self._state(settings, models))

    def write_text(self, path: Path, text: str) -> None:
        """Writes a file whole or not at all, by way of the folder that every run empties first."""
        write_text(path, text, self.temporary)

    def write_json(self, path: Path, content: Any) -> None:
        write_json(path, content, self.temporary)

    def read_record(self, index: int) -> ModelRecord | None:
        """The record of a model; None if it has not been dealt with."""
        path = self.record(index)
        return ModelRecord(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def write_record(self, index: int, record: ModelRecord) -> None:
        self.write_json(self.record(index), asdict(record))

    def forget(self, index: int) -> None:
        """Drops what is known of a model whose source changed."""
        self.record(index).unlink(missing_ok=True)
        self.part(index).unlink(missing_ok=True)

    def begin_assembly(
        self, indices: Sequence[int], rows: Sequence[Mapping[str, Any]], folders: Sequence[str]
    ) -> None:
        """Removes Parquet files that were assembled from other records or rows than there are now."""
        digest = hashlib.sha256()
        for index, row in zip(indices, rows, strict=True):
            digest.update(self.record(index).read_bytes())
            digest.update(json.dumps(dict(row), sort_keys=True).encode())
        plan = {"records": digest.hexdigest()}
        if not self._plan.is_file() or json.loads(self._plan.read_text(encoding="utf-8")) != plan:
            for folder in folders:
                shutil.rmtree(self.output / folder, ignore_errors=True)
        self.write_json(self._plan, plan)

    def remove(self) -> None:
        """Removes all but what the output keeps."""
        shutil.rmtree(self.root, ignore_errors=True)


def finished_run(output: Path) -> dict[str, Any] | None:
    """What `tokenize.json` says; None if no run ended in this folder.

    Raises:
        TokenizeError: the file is not one of ours.
    """
    path = output / REPORT_FILE
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizeError(f"{path} is damaged ({error}). Delete {output} to begin anew.") from error
    if not isinstance(report, dict) or not {"format", "settings", "models", "counts"} <= set(report):
        raise TokenizeError(f"{path} was not written by this command. Name another folder.")
    return report


def remove_refusals(output: Path) -> None:
    """Removes the files of a run that refused every model, and nothing else; the report, which tells so, last."""
    shutil.rmtree(output / MODELS, ignore_errors=True)
    for name in (CARD_FILE, EXTRACTOR_FILE, REPORT_FILE):
        (output / name).unlink(missing_ok=True)


def compare_runs(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, what differs between the settings and sources of two runs; empty if nothing does."""
    parts = []
    if before["format"] != now["format"]:
        parts.append(f"format {before['format']} there, {now['format']} here")
    for key in sorted({*before["settings"], *now["settings"]}):
        # An option that a run of an earlier version did not know was off in it.
        old, new = before["settings"].get(key, False), now["settings"].get(key, False)
        if old != new:
            parts.append(f"{key} was {old!r}, is {new!r}")
    old_ids, new_ids = dict.fromkeys(before["models"]), dict.fromkeys(now["models"])
    for ids, others, word in ((new_ids, old_ids, "more"), (old_ids, new_ids, "fewer")):
        if extra := [model_id for model_id in ids if model_id not in others]:
            listed = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
            parts.append(f"{len(extra)} models {word} ({listed})")
    if old_ids == new_ids and list(old_ids) != list(new_ids):
        parts.append("the models come in another order")
    return "; ".join(parts)
