"""Files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Gives a temporary path to write to, and renames it to `path` at the end; after an error it is deleted.

    Args:
        path: the file; its folder is made where it does not exist.
        folder: on the same file system, for the temporary file; by default that of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (folder or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, folder: Path | None = None) -> None:
    """Writes UTF-8 text; see `replacing`."""
    with replacing(path, folder) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, folder: Path | None = None) -> None:
    """Writes indented JSON; see `replacing`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", folder)
