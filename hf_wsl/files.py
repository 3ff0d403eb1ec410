"""Files and folders that appear, and go, whole or not at all. Those for files also ship with the library."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modeling_wsl.files import naming_full_disk, replacing, sha256, write_json, write_text


__all__ = [
    "move_folder",
    "remove_folder",
    "remove_leftovers",
    "replacing",
    "replacing_folder",
    "sha256",
    "write_json",
    "write_text",
]


@contextmanager
def replacing_folder(path: Path, folder: Path | None = None, flush: bool = False) -> Iterator[Path]:
    """Gives an empty temporary folder to fill, and renames it to `path` at the end; after an error it is deleted.

    For a folder that is there already see `move_folder`.

    Args:
        path: the folder; its parent is made where it does not exist.
        folder: on the same file system, for the temporary folder; by default the parent of `path`.
        flush: the files' content reaches the disk before the folder has its name, so that a power cut does not leave
            a folder of empty files. Killing a process needs no flush.
    """
    temporary = (folder or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    _delete(temporary)  # of a process with the same id that was killed
    temporary.mkdir(parents=True)
    try:
        with naming_full_disk(path):
            yield temporary
            if flush:
                for file in filter(Path.is_file, temporary.rglob("*")):
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
        move_folder(temporary, path)
    finally:
        _delete(temporary)


def move_folder(source: Path, path: Path) -> None:
    """Renames a finished folder to `path`; one that is there is moved aside just before, and deleted just after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _move_aside(path)
    source.rename(path)
    _delete(aside)


def remove_folder(path: Path) -> None:
    """Deletes a folder, or nothing where there is none.

    It is renamed first, to a hidden name beside it: a kill leaves the folder as it was, or no folder of that name.
    """
    _delete(_move_aside(path))


def remove_leftovers(folder: Path) -> None:
    """Deletes what processes that were killed within one of these functions left in a folder; none may be at work."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.removed")]:
        _delete(path)


def _move_aside(path: Path) -> Path:
    """Gives a folder, if it is there, the name under which it is to be deleted, and returns that name."""
    aside = path.with_name(f".{path.name}.removed")
    _delete(aside)  # of a process that was killed while it deleted
    if path.is_dir():
        path.rename(aside)
    return aside


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
