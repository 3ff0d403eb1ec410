"""A folder of results belongs to one set of settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_json


SETTINGS_FILE = "settings.json"


def claim_folder(folder: Path, settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Writes the settings into the folder, or refuses a folder with other ones.

    Args:
        folder: made where it does not exist; gets `settings.json`.
        settings: JSON-serializable.
        what: the folder holds, for the message ("a quickstart").

    Returns:
        The settings as JSON has them: tuples are lists.

    Raises:
        ValueError: the folder holds other settings; the message names each that differs.
    """
    settings = json.loads(json.dumps(settings))
    path = folder / SETTINGS_FILE
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {found.get(key)}, now {settings.get(key)}"
            for key in {**settings, **found}
            if found.get(key) != settings.get(key)
        ]
        if changed:
            raise ValueError(
                f"{folder} holds {what} with other settings: {'; '.join(changed)}. Choose another folder, or delete "
                "this one."
            )
    write_json(path, settings)
    return settings
