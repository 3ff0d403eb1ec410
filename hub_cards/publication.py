"""Publications: which file goes where, under which license, what stays behind, and what the Hub lacks."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub.hf_api import RepoFile

from datasets_scripts.schema import CARD_FILE
from hf_wsl.files import sha256, write_text
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, read_json
from modeling_wsl.checkpoints.folders import INDEX_SUFFIX, parse_index

from .cards import choose_card
from .errors import PublishError


STAGING = ".publish"  # inside the folder: what is written for the Hub alone; removed when all of it is there
TEXT_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "CITATION.cff")  # a folder's texts go along
NEW, CHANGED, UNCHANGED, OUTDATED = "new", "changed", "unchanged", "outdated"


@dataclass(frozen=True)
class Publication:
    """A folder that has been checked, and what of it goes to the Hub.

    Attributes:
        folder: what was named.
        kind: in words.
        repo_type: "model" or "dataset".
        files: path in the repository -> file here.
        owned: patterns of paths that belong to this kind: what a repository has of these beyond `files` is outdated.
        license: in words.
        withheld: name -> why it stays behind, for parts of the payload.
        left: other entries of the folder that stay behind.
        notes: what the publisher should know.
        card: text of README.md to write into the folder too; None leaves it as it is.
    """

    folder: Path
    kind: str
    repo_type: str
    files: dict[str, Path]
    owned: tuple[str, ...]
    license: str
    withheld: dict[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    card: str | None = None

    def write_card(self) -> None:
        """Writes the card into the folder, where it is ours to write."""
        if self.card is not None:
            write_text(self.folder / CARD_FILE, self.card)

    def remove_staging(self) -> None:
        """Removes what was written for the Hub alone."""
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)


def model_publication(
    folder: Path,
    kind: str,
    files: Iterable[str],
    staged: Mapping[str, Path],
    owned: tuple[str, ...],
    license: str,
    written: str,
    on_hub: str | None,
) -> Publication:
    """The publication of a model, with its card or the one that a person wrote.

    Args:
        files: names in the folder that go along, beside its texts.
        staged: path in the repository -> another file here.
        owned, license: as in `Publication`.
        written: the card of ours.
        on_hub: README.md of the repository, None where it has none.

    Raises:
        PublishError: the card in the folder cannot be published.
    """
    card, notes, own_here = choose_card(folder, written, on_hub)
    readme = folder / CARD_FILE
    if not own_here:
        readme = folder / STAGING / CARD_FILE
        write_text(readme, card)
    contents = {name: folder / name for name in [*text_files(folder), *files]} | dict(staged) | {CARD_FILE: readme}
    return Publication(
        folder=folder,
        kind=kind,
        repo_type="model",
        files=contents,
        owned=owned,
        license=license,
        left=left_behind(folder, contents),
        notes=tuple(notes),
        card=None if own_here else card,
    )


def read_facts(path: Path, required: Iterable[str]) -> dict[str, Any]:
    """A JSON file of ours.

    Raises:
        PublishError: it is missing, damaged, or lacks one of the `required` entries.
    """
    try:
        content = read_json(path, path.name)
    except (CheckpointError, OSError) as error:
        raise PublishError(f"{path}: cannot be read ({error}).") from error
    missing = [name for name in required if not isinstance(content, dict) or name not in content]
    if missing:
        raise PublishError(
            f"{path} lacks {', '.join(missing)}: it is incomplete, or of another version of hf-wsl. Make it anew."
        )
    return content


def weight_files(folder: Path) -> list[str]:
    """The safetensors files of a model's folder, with the index where it is sharded; their headers are read.

    Raises:
        PublishError: none, a shard is missing, or a file is cut off or damaged.
    """
    index = folder / f"model{INDEX_SUFFIX}"
    try:
        if index.is_file():
            shards = parse_index(index, read_json(index, index.name)).shards
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise PublishError(f"{folder}: {index.name} names {missing[0]}, which is not there. Save it again.")
            names = [*sorted(shards), index.name]
        else:
            names = ["model.safetensors"]
            if not (folder / names[0]).is_file():
                raise PublishError(f"{folder} has no model.safetensors. Was it saved to the end?")
        with open_checkpoint(folder) as checkpoint:
            if not checkpoint.tensors:
                raise PublishError(f"{folder}: its weight files hold no tensors.")
    except CheckpointError as error:
        raise PublishError(f"{folder} is not complete: {error}") from error
    return names


def text_files(folder: Path) -> list[str]:
    """License texts and the like beside the model."""
    return sorted(path.name for pattern in TEXT_FILES for path in folder.glob(pattern) if path.is_file())


def left_behind(folder: Path, taken: Iterable[str]) -> tuple[str, ...]:
    """Entries of a folder that are not published; folders end in a slash."""
    first_parts = {name.split("/")[0] for name in taken}
    entries = sorted(path for path in folder.iterdir() if path.name not in first_parts and path.name != STAGING)
    return tuple(f"{path.name}/" if path.is_dir() else path.name for path in entries)


def refuse_leftovers(folder: Path, names: Sequence[str], remedy: str) -> None:
    """Refuses a folder in which an unfinished run left its mark.

    Raises:
        PublishError: one of the `names` (patterns) is there.
    """
    left = sorted(path.name for name in names for path in folder.glob(name))
    if left:
        raise PublishError(f"{folder} holds {left[0]}, which a run left that has not ended. {remedy}")


@dataclass(frozen=True)
class FileChange:
    """One file: `state` is new, changed, unchanged, or outdated (it will be deleted); `size` in bytes."""

    path: str
    size: int
    state: str


def compare(publication: Publication, there: Mapping[str, RepoFile]) -> Iterator[FileChange]:
    """The state of each file; files are read only where one of the same size is on the Hub.

    Args:
        there: the files of the repository, by path.
    """
    for path, local in publication.files.items():
        size, remote = local.stat().st_size, there.get(path)
        if remote is None:
            state = NEW
        else:
            state = UNCHANGED if remote.size == size and has_content(local, remote) else CHANGED
        yield FileChange(path, size, state)
    for path, remote in there.items():
        if path not in publication.files and any(fnmatch(path, pattern) for pattern in publication.owned):
            yield FileChange(path, remote.size, OUTDATED)


def has_content(local: Path, remote: RepoFile) -> bool:
    """Whether a file here has the bytes of one there, by sha256 for large files and by git's hash for others."""
    if remote.lfs is not None:
        return sha256(local) == remote.lfs.sha256
    with local.open("rb") as stream:
        blob = hashlib.sha1(f"blob {local.stat().st_size}\0".encode())
        return hashlib.file_digest(stream, lambda: blob).hexdigest() == remote.blob_id


def readable_size(size: int) -> str:
    """A number of bytes in decimal units, as the Hub shows them: 1,234,567 -> "1.2 MB"."""
    if size < 1000:
        return f"{size} B"
    units = ("kB", "MB", "GB")
    power = min((len(str(size)) - 1) // 3, len(units))
    return f"{size / 1000**power:,.1f} {units[power - 1]}"
