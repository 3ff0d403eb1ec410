"""What all cards share: front matter and text from facts, and the checks that a card has to pass."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from modeling_wsl.hub_card import is_ours, signed

from .errors import PublishError


CARD_FILE = "README.md"
PLACEHOLDER = re.compile(r"\[More Information Needed\]")


def fill_template(name: str, values: Mapping[str, Any]) -> str:
    """The text of `templates/<name>.md` with its `$names` replaced.

    Raises:
        KeyError: a name of the template has no value.
    """
    return Template(resources.files(__package__).joinpath("templates", f"{name}.md").read_text("utf-8")).substitute(
        values
    )


def model_card(data: ModelCardData, text: str) -> str:
    """Front matter and text of a card of ours, signed."""
    return signed(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def is_somebodys(card: str) -> bool:
    """Whether there is a person's work in a card: it is neither ours nor a template that nobody filled in."""
    return not is_ours(card) and not PLACEHOLDER.search(card)


def read_card(path: Path) -> str | None:
    """The README.md of a folder, or None. Line ends are kept: a changed one is a change."""
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None


def check_card(card: str, origin: str) -> dict[str, Any]:
    """Reads a card as the Hub's client does.

    Args:
        card: the whole README.md.
        origin: where it is from, for messages.

    Returns:
        its front matter.

    Raises:
        PublishError: no front matter, or one that the client cannot read; a placeholder that nobody filled in.
    """
    try:
        front = ModelCard(card).data.to_dict()
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise PublishError(f"{origin}: its front matter cannot be read ({' '.join(str(error).split())}).") from error
    if not card.startswith("---") or not front:
        raise PublishError(f"{origin} has no front matter (a block between two lines `---`); the Hub needs a license.")
    if found := PLACEHOLDER.search(card):
        line = card.count("\n", 0, found.start()) + 1
        raise PublishError(f"{origin}, line {line}: [More Information Needed] is still there. Fill it in or drop it.")
    return front


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; columns of numbers are written as text by the caller."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def number(value: float | None, form: str = ".3f") -> str:
    """A measured number, or the words for one that was not measured."""
    return "not measured" if value is None else format(value, form)
