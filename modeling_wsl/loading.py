"""The backbone that comes with the library: what is used where no other is named."""

from pathlib import Path


DEFAULT_BACKBONE = "default"  # its name, wherever a backbone is asked for
DEFAULT_FOLDER = Path(__file__).parent / "default"  # package data, with a card that says what it was trained on
