"""Parts of one model, joined by the rule that their layout states."""

from pathlib import Path

from ..containers.container import Contents
from ..errors import CheckpointError
from .layouts import layout_of, names_in


def parts_contents(folder: Path, key: str | None) -> Contents:
    """Contents of the model whose parts lie in a folder.

    Raises:
        CheckpointError: a part is missing or damaged, or nothing in the files says how they are joined.
    """
    layout = layout_of(folder, names_in(folder))
    raise CheckpointError(folder, f"holds parts of a model ({layout}) that are not joined yet", "Join them")
