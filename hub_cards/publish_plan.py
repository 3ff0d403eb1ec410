"""What publishing would do: each file compared with what the Hub has, before anything is sent."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.hf_api import RepoFile

from .hub_repository import HubRepository
from .publication import Publication


NEW, CHANGED, UNCHANGED, OUTDATED = "new", "changed", "unchanged", "outdated"
UNITS = ("kB", "MB", "GB")  # decimal, as the Hub shows them


@dataclass(frozen=True)
class FileChange:
    """One file: `state` is new, changed, unchanged, or outdated (it will be deleted); `size` in bytes."""

    path: str
    size: int
    state: str


@dataclass(frozen=True)
class PublishPlan:
    """All that publishing will do.

    Attributes:
        publication: what is published.
        there: where, and what is there.
        create_pr: propose it as a pull request.
        changes: every file, in the order in which they are sent.
    """

    publication: Publication
    there: HubRepository
    create_pr: bool
    changes: tuple[FileChange, ...]

    @property
    def to_send(self) -> list[FileChange]:
        return self.of_state(NEW, CHANGED)

    @property
    def does_nothing(self) -> bool:
        """Whether the Hub has exactly this already."""
        return self.there.exists and self.there.branch_exists and not self.of_state(NEW, CHANGED, OUTDATED)

    def of_state(self, *states: str) -> list[FileChange]:
        return [change for change in self.changes if change.state in states]

    def lines(self) -> list[str]:
        """The plan for people to read."""
        publication, there = self.publication, self.there
        branch = f", branch {there.revision}{'' if there.branch_exists else ' (new)'}" if there.revision else ""
        proposed = ", as a pull request" if self.create_pr else ""
        visibility, known = "private" if there.private else "public", "exists" if there.exists else "will be made"
        width = max((len(change.path) for change in self.changes), default=0)
        lines = [
            f"{publication.kind} {publication.folder}",
            f"to {there.url} ({publication.repo_type}, {visibility}, {known}{branch}{proposed})",
            f"license: {publication.license}",
            *(f"  {c.state:<9} {c.path:<{width}}  {readable_size(c.size):>9}" for c in self.changes),
            f"{len(self.to_send)} files to send, {readable_size(sum(change.size for change in self.to_send))}; "
            f"{len(self.of_state(UNCHANGED))} unchanged; {len(self.of_state(OUTDATED))} outdated ones to delete",
        ]
        lines += [f"withheld: {name}: {reason}" for name, reason in publication.withheld.items()]
        if publication.left:
            lines.append(f"stays here: {', '.join(publication.left)}")
        return [*lines, *(f"note: {note}" for note in publication.notes)]


def compare(publication: Publication, there: Mapping[str, RepoFile]) -> Iterator[FileChange]:
    """Each file's state; files are read only where one of the same size is there."""
    for path, local in publication.files.items():
        size, remote = local.stat().st_size, there.get(path)
        if remote is None:
            state = NEW
        elif remote.size == size and has_content(local, remote):
            state = UNCHANGED
        else:
            state = CHANGED
        yield FileChange(path, size, state)
    for path, remote in there.items():
        if path not in publication.files and publication.owns(path):
            yield FileChange(path, remote.size, OUTDATED)


def has_content(local: Path, remote: RepoFile) -> bool:
    """Whether a file here has the bytes of one there, by sha256 for large files and by git's hash for others."""
    with local.open("rb") as stream:
        if remote.lfs is not None:
            return hashlib.file_digest(stream, "sha256").hexdigest() == remote.lfs.sha256
        blob = hashlib.sha1(f"blob {local.stat().st_size}\0".encode())
        return hashlib.file_digest(stream, lambda: blob).hexdigest() == remote.blob_id


def readable_size(size: int) -> str:
    """1,234,567 -> "1.2 MB"."""
    if size < 1000:
        return f"{size} B"
    power = min((len(str(size)) - 1) // 3, len(UNITS))
    return f"{size / 1000**power:,.1f} {UNITS[power - 1]}"
