"""A folder that belongs to one run: claimed for its settings, written under temporary names, resumed after any kill.

Every file appears under its final name by a rename, after all that it speaks of: what a task made before the task's
record, all records before the report that ends the run. So a file that is there is whole, and a task that has a record
is done. Killing a process loses nothing that was renamed. Files are not flushed to the disk one by one: after a power
failure the folder is best deleted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import remove_folder, remove_leftovers, replacing, replacing_folder, write_json, write_text


SETTINGS_FILE = "settings.json"
BEING_DELETED = {"being deleted": True}  # the settings of a run that `overwrite` deletes, until it is gone
OVERWRITE = "overwrite this one with --overwrite_output_dir"
NAMES_SHOWN = 3  # of a longer list, in a message


class RunFolderError(ValueError):
    """A folder that a run cannot have; the message says why and what to do."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's folder and what keeps them safe. It can be pickled; worker processes write with it too.

    Attributes:
        output: the folder that the user named.
        what: it holds, for messages ("a zoo").
        state: the folder within `output` of the settings, the records and all that is temporary; "." is `output`.
        records: the folder of the records, within the state.
        report: the file of `output` that is written last; with it the run is finished.
    """

    output: Path
    what: str = "a run"
    state: str = "."
    records: str = "records"
    report: str = "report.json"

    @property
    def root(self) -> Path:
        """The folder of the state."""
        return self.output / self.state

    @property
    def temporary(self) -> Path:
        """A folder for unfinished files, on the same disk; empty when a run begins."""
        return self.root / ".temporary"

    @property
    def settings_file(self) -> Path:
        return self.root / SETTINGS_FILE

    @contextmanager
    def open(
        self, settings: Mapping[str, Any], *, overwrite: bool | None = None, ours: Sequence[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Begins a run, or goes on with one of the same settings; no other process can until the block ends.

        Args:
            settings: what decides the result; anything that JSON has.
            overwrite: delete a run that is there, finished or not. None: the command has no option for it.
            ours: names of files and folders that may be in `output` before the run is begun, and outlive it.

        Returns:
            The settings as JSON has them: tuples are lists.

        Raises:
            RunFolderError: another process is writing here; the folder holds a run with other settings (each is
                named), or files that no run wrote. Nothing was changed then.
        """
        settings = json.loads(json.dumps(settings))
        if not self._is_run() and self.output.is_dir():
            foreign = [p.name for p in sorted(self.output.iterdir()) if p.name[0] != "." and p.name not in ours]
            if foreign:
                raise RunFolderError(
                    f"{self.output} holds other files ({_shown(foreign)}) and is not {self.what}. Name a new or an "
                    "empty folder."
                )
        with self._locked():
            if self._is_run():
                if overwrite or self._read(self.settings_file) == BEING_DELETED:
                    self._clear(ours)
                else:
                    self.check_settings(settings, overwrite=overwrite)
            remove_folder(self.temporary)
            for folder in (self.output, self.root):
                remove_leftovers(folder)  # of runs that were killed
            self.temporary.mkdir()
            if not self.settings_file.is_file():
                self.write_json(self.settings_file, settings)
            try:
                yield settings
            finally:
                remove_folder(self.temporary)

    def check_settings(self, settings: Mapping[str, Any], *, overwrite: bool | None = None) -> None:
        """Compares the run that is there with settings; changes nothing.

        Raises:
            RunFolderError: they differ; or the run is finished and has no settings any more, see `remove_state`.
        """
        before = self._read(self.settings_file)
        advice = f"choose another folder, or {'delete this one' if overwrite is None else OVERWRITE}."
        if before is None:
            raise RunFolderError(f"{self.output} holds {self.what} that is finished: {advice}")
        if changed := differences(before, json.loads(json.dumps(settings))):
            raise RunFolderError(
                f"{self.output} holds {self.what} with other settings: {'; '.join(changed)}. Give the same settings "
                f"to go on with it, {advice}"
            )

    def read_report(self) -> dict[str, Any] | None:
        """The report of a finished run; None if the run has not ended.

        Raises:
            RunFolderError: the file is damaged.
        """
        return self._read(self.output / self.report)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Writes the report, the last file of a run."""
        self.write_json(self.output / self.report, report)

    def record(self, task: str) -> Path:
        """The file that says that a task is done."""
        return self.root / self.records / f"{task}.json"

    def is_done(self, task: str) -> bool:
        return self.record(task).is_file()

    def read_record(self, task: str) -> dict[str, Any] | None:
        """The record of a task; None if it is not done. Raises RunFolderError where the file is damaged."""
        return self._read(self.record(task))

    def write_record(self, task: str, content: Mapping[str, Any]) -> None:
        """Marks a task as done, with what is to be known of it; the last file that the task writes."""
        self.write_json(self.record(task), content)

    def forget(self, task: str) -> None:
        """A task that is to be done again."""
        self.record(task).unlink(missing_ok=True)

    def replacing(self, path: Path) -> AbstractContextManager[Path]:
        """A temporary path for a file; see `files.replacing`."""
        return replacing(path, self.temporary)

    def replacing_folder(self, path: Path) -> AbstractContextManager[Path]:
        """An empty temporary folder; see `files.replacing_folder`."""
        return replacing_folder(path, self.temporary)

    def write_text(self, path: Path, text: str) -> None:
        write_text(path, text, self.temporary)

    def write_json(self, path: Path, content: Any) -> None:
        write_json(path, content, self.temporary)

    def remove_state(self) -> None:
        """Deletes all but what the output keeps, where the state has a folder of its own."""
        if self.root != self.output:
            remove_folder(self.root)

    def _is_run(self) -> bool:
        return self.settings_file.is_file() or (self.output / self.report).is_file()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(
                f"{self.output}: another run is writing here. Wait until it ends, or choose another folder."
            ) from error
        try:  # the lock is the process's: one that is killed lets go of it
            yield
        finally:
            lock.release()

    def _clear(self, ours: Sequence[str]) -> None:
        """Deletes a run; where that is interrupted, the next run goes on with it."""
        write_json(self.settings_file, BEING_DELETED)
        kept = {self.settings_file, self.root, self.root / ".lock", *(self.output / name for name in ours)}
        for path in {*self.output.iterdir(), *self.root.iterdir()} - kept:
            if path.name[0] == ".":  # the user's (.gitattributes), or temporary
                continue
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink()
        self.settings_file.unlink()

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunFolderError(f"{path} is damaged ({error}). Delete {self.output} to begin anew.") from error
        if not isinstance(content, dict):
            raise RunFolderError(f"{path} was not written by this command. Choose another folder.")
        return content


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences between two runs' settings, in words; empty if there are none.

    An option that only one of them knows was off in the other, which a later or earlier version wrote.
    """
    changed = []
    for key in {**now, **before}:
        old, new, name = before.get(key), now.get(key), f"{prefix}{key}"
        in_both = key in before and key in now
        if old == new or not (in_both or old or new):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differences(old, new, f"{name}.")
        elif all(isinstance(v, list) and v and all(isinstance(item, str) for item in v) for v in (old, new)):
            more, fewer = [v for v in new if v not in set(old)], [v for v in old if v not in set(new)]
            changed += [f"{len(more)} {name} more ({_shown(more)})"] if more else []
            changed += [f"{len(fewer)} {name} fewer ({_shown(fewer)})"] if fewer else []
            changed += [] if more or fewer else [f"{name} come in another order"]
        else:
            changed.append(f"{name} was {old}, now {new}")
    return changed


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
