"""Parts of one model, joined by the rule that their layout states."""

from pathlib import Path
from typing import Any

from ..containers.container import Contents
from ..containers.torch_files import load_torch_file
from ..errors import CheckpointError
from ..formats import identify
from .dcp import dcp_contents
from .layouts import layout_of, list_files, megatron_files
from .ranks import megatron_contents, ranks_contents
from .zero import universal_contents, zero_contents


def parts_contents(folder: Path, key: str | None) -> Contents:
    """Contents of the model whose parts lie in a folder.

    Raises:
        CheckpointError: a part is missing or damaged, or nothing in the files says how they are joined.
    """
    names = list_files(folder)
    layout = layout_of(folder, names)
    if layout == "dcp":
        return dcp_contents(folder, key)
    if layout == "ranks":
        return ranks_contents(folder, names, key, load_part)
    if key is not None:
        raise CheckpointError(folder, f"is joined from parts: it has no state dict for key={key!r}", "Leave key= out")
    if layout == "megatron":
        return megatron_contents(folder, megatron_files(folder, names), load_part)
    return (universal_contents if layout == "universal" else zero_contents)(folder, names, load_part)


def load_part(path: Path) -> Any:
    """Everything that a torch file holds, mapped where it can be; nothing of it is run."""
    kind = identify(path)
    if kind not in ("torch archive", "torch legacy"):
        raise CheckpointError(path, f"is a {kind} file, where a part of a model is expected", "Fetch it again")
    return load_torch_file(path, kind)
