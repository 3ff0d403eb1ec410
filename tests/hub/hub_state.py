"""What the tests' Hub keeps: files, commits, repositories and accounts. File and tree ids are those that git gives."""

import hashlib
import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path


LFS_NAMES = re.compile(
    r".*\.(7z|arrow|bin|bz2|ckpt|gz|h5|joblib|model|msgpack|npy|npz|onnx|ot|parquet|pb|pickle|pkl|pt|pth|safetensors|tar"
    r"|tflite|tgz|xz|zip|zst|png|jpg)"
)
LFS_SIZE = 10 * 1024**2  # bytes: larger files of any name are LFS files
PIECE = 1024**2  # bytes read from disk at once
WHOLE = 64 * 1024**2  # bytes: larger files on disk are told apart by path and time instead of by their sha256
FIRST_DAY = datetime(2024, 1, 1, tzinfo=UTC)


class HubFile:
    """Contents of a file: bytes, text, or the path of a file on disk, which is never read whole.

    `sha256` states another checksum than that of the contents; `lfs` overrules what the name says.
    """

    def __init__(self, source: "bytes | str | Path", sha256: str | None = None, lfs: bool | None = None):
        self.path = source if isinstance(source, Path) else None
        self.data = source.encode() if isinstance(source, str) else source if isinstance(source, bytes) else None
        self.size = len(self.data) if self.path is None else os.path.getsize(self.path)
        self.lfs = lfs
        self._stated_sha256 = sha256

    def pieces(self, start: int = 0, length: int | None = None):
        """Yields the contents from `start` on, a piece at a time."""
        end = self.size if length is None else min(self.size, start + length)
        if self.path is None:
            yield memoryview(self.data)[start:end]
            return
        with self.path.open("rb") as stream:
            stream.seek(start)
            while start < end:
                piece = stream.read(min(PIECE, end - start))
                yield piece
                start += len(piece)

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        return b"".join(self.pieces(start, length))

    @cached_property
    def sha256(self) -> str:
        if self._stated_sha256:
            return self._stated_sha256
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git keeps for an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def _plain_blob_id(self) -> str:
        digest = hashlib.sha1(f"blob {self.size}\0".encode())
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    @cached_property
    def _pointer_blob_id(self) -> str:
        return hashlib.sha1(f"blob {len(self.pointer)}\0".encode() + self.pointer).hexdigest()

    def is_lfs(self, name: str) -> bool:
        if self.lfs is not None:
            return self.lfs
        return bool(LFS_NAMES.fullmatch(name.lower())) or self.size > LFS_SIZE

    def blob_id(self, name: str) -> str:
        return self._pointer_blob_id if self.is_lfs(name) else self._plain_blob_id

    @cached_property
    def identity(self) -> str:
        if self.path is not None and self.size > WHOLE and not self._stated_sha256:
            return f"{self.path} {self.size} {self.path.stat().st_mtime_ns}"
        return f"{self.sha256} {self.size}"


def as_file(source: "HubFile | bytes | str | Path") -> HubFile:
    return source if isinstance(source, HubFile) else HubFile(source)


@dataclass
class Commit:
    id: str
    parent: "Commit | None"
    title: str
    date: str  # 2024-01-01T00:00:00.000Z
    author: str
    files: dict[str, HubFile]

    @cached_property
    def trees(self) -> dict[str, str]:
        """Folder -> git's id of its tree; "" is the root."""
        folders: dict[str, dict[str, tuple[str, str]]] = {"": {}}
        for name, file in self.files.items():
            parts = name.split("/")
            for depth in range(1, len(parts)):
                folders.setdefault("/".join(parts[:depth]), {})
            folders["/".join(parts[:-1])][parts[-1]] = ("100644", file.blob_id(name))
        ids = {}
        for folder in sorted(folders, key=lambda name: (-name.count("/"), name == "", name)):
            rows = sorted(folders[folder].items(), key=lambda row: row[0] + ("/" if row[1][0] == "40000" else ""))
            body = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in rows)
            ids[folder] = hashlib.sha1(f"tree {len(body)}\0".encode() + body).hexdigest()
            if folder:
                parent, _, name = folder.rpartition("/")
                folders[parent][name] = ("40000", ids[folder])
        return ids

    def last_change(self, name: str) -> "Commit":
        """The commit that gave a file, or a folder, the contents it has here."""

        def contents(commit: Commit) -> str | None:
            file = commit.files.get(name)
            return file.blob_id(name) if file else commit.trees.get(name)

        commit = self
        while commit.parent is not None and contents(commit.parent) == contents(self):
            commit = commit.parent
        return commit


@dataclass
class Repository:
    """A model, dataset or Space with all its commits. `revisions` maps branches and tags to commit ids."""

    repo_id: str
    repo_type: str = "model"
    private: bool = False
    gated: bool | str = False  # False, "auto" or "manual"
    gated_to: frozenset[str] = frozenset()  # tokens that may read the files of a gated repository
    disabled: bool = False
    vanished: bool = False  # still listed, and not found when asked for
    downloads: int = 0
    likes: int = 0
    labels: tuple[str, ...] = ()  # tags beyond those that follow from card, config and files
    info: dict = field(default_factory=dict)  # overrules fields of the answer to model_info and of listings
    created: str = ""
    number: int = 0
    revisions: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)  # names in `revisions` that are tags
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def head(self) -> Commit:
        return self.commits[self.revisions["main"]] if "main" in self.revisions else list(self.commits.values())[-1]

    @property
    def commit(self) -> str:
        return self.head.id

    @property
    def files(self) -> dict[str, HubFile]:
        return self.head.files

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or a full commit id."""
        return self.commits.get(self.revisions.get(revision, revision))

    def add_commit(
        self, files: dict[str, HubFile], clock: "Clock", title: str, author: str, revision: str = "main"
    ) -> Commit:
        parent = self.at(revision)
        rows = [f"{name} {file.identity}" for name, file in sorted(files.items())]
        text = "\n".join([self.repo_type, self.repo_id, parent.id if parent else "", title, *rows])
        identity = hashlib.sha1(text.encode()).hexdigest()
        commit = Commit(identity, parent, title, clock.next(), author, files)
        self.commits[commit.id] = commit
        self.revisions[revision] = commit.id
        return commit


class Clock:
    """Dates that are the same in every run: one minute passes at every commit."""

    def __init__(self):
        self.minutes = 0

    def next(self) -> str:
        self.minutes += 1
        moment = FIRST_DAY + timedelta(minutes=self.minutes)
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True)
class Account:
    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"  # or "read"

    def owns(self, repository_or_owner: str) -> bool:
        return repository_or_owner.split("/")[0] in (self.name, *self.orgs)


DEFAULT_ACCOUNTS = {
    "hf_alice": Account("alice", ("org",)),
    "hf_bob": Account("bob"),
    "hf_reader": Account("reader", (), "read"),
}
