"""What is to be published: which file goes where, under which license, and what stays behind."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_wsl.files import write_text
from modeling_wsl.checkpoints.checkpoint import open_checkpoint
from modeling_wsl.checkpoints.errors import CheckpointError, read_json
from modeling_wsl.checkpoints.folders import INDEX_SUFFIX, parse_index
from modeling_wsl.hub_card import is_ours

from .card_text import CARD_FILE, check_card, is_somebodys, read_card
from .errors import PublishError


STAGING = ".publish"  # inside the folder: what is written for the Hub alone; removed when all of it is there
# Beside the files of its kind, a folder's texts go along.
TEXT_FILES = ("LICENSE*", "LICENSE*", "NOTICE*", "CITATION.cff")
OWN_HERE = "README.md is your own, or was changed since: it is kept. Delete it to have it written anew."
OWN_THERE = (
    "README.md on the Hub is somebody's own, or was changed there: it is kept. Delete it there to have it anew."
)


@dataclass(frozen=True)
class Publication:
    """A folder that has been checked, and what of it goes to the Hub.

    Attributes:
        folder: what was named.
        kind: in words.
        repo_type: "model" or "dataset".
        files: path in the repository -> file here; the last ones make the others usable, so they are sent last.
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

    def owns(self, path: str) -> bool:
        """Whether a path of the repository belongs to this kind of content."""
        return any(fnmatch(path, pattern) for pattern in self.owned)

    def write_card(self) -> None:
        """Writes the card into the folder, where it is ours to write."""
        if self.card is not None:
            write_text(self.folder / CARD_FILE, self.card)

    def remove_staging(self) -> None:
        """Removes what was written for the Hub alone."""
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)


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
    found = sorted(path.name for name in names for path in folder.glob(name))
    if found:
        raise PublishError(f"{folder} holds {found[0]}, which a run left that has not ended. {remedy}")


def stage_card(folder: Path, written: str, on_hub: str | None) -> tuple[Path, str | None, list[str]]:
    """Chooses between the card in the folder, the one on the Hub and the one written now: people's own come first.

    Args:
        folder: of the model.
        written: the card of ours.
        on_hub: README.md of the repository, None where it has none.

    Returns:
        the file to send, the text to write into the folder (None: it has somebody's own card), and notes.

    Raises:
        PublishError: the card in the folder cannot be published.
    """
    here = read_card(folder / CARD_FILE)
    if here is not None and not is_ours(here):
        front = check_card(here, str(folder / CARD_FILE))
        notes = [OWN_HERE] if front.get("license") else [OWN_HERE, "README.md names no license in its front matter."]
        return folder / CARD_FILE, None, notes
    check_card(written, CARD_FILE)
    kept = on_hub is not None and is_somebodys(on_hub)
    chosen = on_hub if kept else written
    write_text(folder / STAGING / CARD_FILE, chosen)
    return folder / STAGING / CARD_FILE, chosen, [OWN_THERE] if kept else []
