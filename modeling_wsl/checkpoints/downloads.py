"""Files of the Hub in the client's cache, sure to hold the bytes that the Hub states.

The client takes wrong bytes of the right size for a file, with and without Xet, and its cache keeps them. Here a file
is hashed the first time that it is used; a note beside it in the cache says so to later processes.
"""

import hashlib
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import WeakFileLock

from ..files import write_text
from .errors import DamagedFileError


NOTES = ".verified"  # folder in the cache of a repository: a file a digest, with size and time of what was hashed
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1, or the SHA-256 of a file in large-file storage
PIECE = 1 << 20
_verified: set[tuple[str, str, str]] = set()  # what a cache that cannot be written to takes no note of


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit.

    Attributes:
        path: within the repository.
        size: bytes.
        sha256: of a file in large-file storage, by Xet or not.
        blob_id: git's SHA-1 of any other file.
    """

    path: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None

    @classmethod
    def of(cls, path: str, facts: Any) -> "HubFile":
        """From what the Hub lists (`RepoSibling`, with `files_metadata`, or `RepoFile`)."""
        return cls(path, facts.size or 0, facts.lfs.sha256 if facts.lfs else None, facts.blob_id)

    def new_digest(self) -> Any:
        return new_digest(self.digest or "", self.size)

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.blob_id


def new_digest(stated: str, size: int) -> Any:
    """The hash that `stated` is one of: SHA-256, or git's of a file of `size` bytes."""
    if len(stated) == 40:
        return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    return hashlib.sha256()


def fetch(
    repo_id: str,
    path: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    repo_type: str = "model",
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """A file of the Hub on this machine, as `hf_hub_download`, but with the bytes that the Hub states.

    A file with other bytes is dropped from the cache and fetched once more. Its digest is the name that the client
    gives to the file in its cache; on a disk without links the Hub is asked for it.

    Raises:
        DamagedFileError: the bytes were wrong twice (then nothing is kept), or they are wrong in the cache and cannot
            be fetched or dropped now.
        Exception: as `hf_hub_download`.
    """

    def download() -> Path:
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return Path(hf_hub_download(repo_id, path, repo_type=repo_type, **options))

    file = download()
    folder = file.parents[path.count("/") + 2]  # of the repository, in the cache: <folder>/snapshots/<commit>/<path>
    if not DIGEST.fullmatch(stated := file.resolve().name):  # a disk without links, where names do not tell
        if local_files_only:
            return file
        rows = HfApi(token=token).get_paths_info(
            repo_id, [path], revision=file.parents[path.count("/")].name, repo_type=repo_type
        )
        stated = HubFile.of(path, rows[0]).digest
    if is_verified(file, stated, folder):
        return file
    wrong = f"{path} has other bytes than the Hub states (digest {stated[:12]})"
    try:
        lock = folder.parent / ".locks" / folder.name / f"{stated}.verified.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if is_verified(file, stated, folder):  # another process has fetched it meanwhile
                return file
            drop(file)
            try:
                file = download()
            except Exception as error:
                reason = f"{wrong} in the cache, and cannot be fetched again now ({type(error).__name__})"
                raise DamagedFileError(repo_id, reason, "Run again when the Hub can be reached") from error
            if is_verified(file, stated, folder):
                return file
            drop(file)
    except OSError as error:
        reason = f"{wrong}, and the cache cannot be changed ({error.strerror or error})"
        raise DamagedFileError(repo_id, reason, f"Delete {file.resolve()} and run again") from error
    advice = "Try again later; if that does not help, the disk, the way to the Hub or the upload is damaged"
    raise DamagedFileError(repo_id, f"{wrong}, although it was fetched twice", advice)


def is_verified(file: Path, stated: str, folder: Path) -> bool:
    """Whether a file has the stated digest; it is hashed where it was not before, or was changed since."""
    try:
        facts = file.stat()
        state = f"{facts.st_size} {facts.st_mtime_ns}"
        note, known = folder / NOTES / stated, (str(file.resolve()), stated, state)
        if known in _verified or note.is_file() and note.read_text(encoding="utf-8") == state:
            return True
        digest = new_digest(stated, facts.st_size)
        with file.open("rb") as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
    except FileNotFoundError:  # another process drops it
        return False
    if digest.hexdigest() != stated:
        return False
    try:
        write_text(note, state)
    except OSError:
        _verified.add(known)
    return True


def drop(file: Path) -> None:
    """Takes a file and its blob out of the cache."""
    file.resolve().unlink(missing_ok=True)
    file.unlink(missing_ok=True)
