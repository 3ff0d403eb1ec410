"""Files that appear whole or not at all, and digests. Standard library alone: it ships with remote code."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


Content = str | bytes | bytearray | memoryview | Path


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """Gives a temporary path to write to, and renames it to `path` at the end; after an error it is deleted.

    Args:
        path: the file; its folder is made where it does not exist.
        folder: on the same file system, for the temporary file; by default that of `path`.

    Raises:
        OSError: the file cannot be written; it is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (folder or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with naming_full_disk(path):
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, os.fspath(temporary)):  # Arrow names no file
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Raises what says that the disk is full as an OSError with the name of what was to be written.

    A write does not know its file, and safetensors and pyarrow give the system's words without its number.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in full or any(os.strerror(code) in str(error) for code in full):
            number = number if number in full else errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def write_text(path: Path, text: str, folder: Path | None = None) -> None:
    """Writes UTF-8 text; see `replacing`."""
    with replacing(path, folder) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, folder: Path | None = None) -> None:
    """Writes indented JSON; see `replacing`."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n", folder)


def sha256(content: Content | Iterable[Content]) -> str:
    """The SHA-256 of some content, as 64 hexadecimal digits.

    Args:
        content: text (as UTF-8), bytes, the path of a file (what the file holds), or several of these, one after the
            other; among several also anything else with a buffer of contiguous memory, such as a NumPy array.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in [content] if isinstance(content, Content) else content:
        if isinstance(part, Path):
            with part.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
