"""The common part of all cards: templates filled with facts, and the checks that a card has to pass."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from datasets_scripts.schema import CARD_FILE
from modeling_wsl.hub_card import is_ours, signed

from .errors import PublishError


TEMPLATES = Path(__file__).parent / "templates"
PLACEHOLDER = re.compile(r"\[More Information Needed\]")
ABSOLUTE = re.compile(r"(?:~?/|[A-Za-z]:[\\/])[^\n]*")
OWN_HERE = "README.md is your own, or was changed since: it is kept. Delete it to have it written anew."
OWN_THERE = (
    "README.md on the Hub is somebody's own, or was changed there: it is kept. Delete it there to have it anew."
)


def fill_card(template: str, data: ModelCardData, **values: Any) -> str:
    """README.md from `templates/<template>.md` with its front matter, signed.

    Args:
        data: front matter; its entries are names of the template, too.
        values: by the template's names; text of other people's is made `plain` or `code` first.
    """
    card = ModelCard.from_template(data, template_path=str(TEMPLATES / f"{template}.md"), **values)
    return signed(str(card).strip() + "\n")


def choose_card(folder: Path, written: str, on_hub: str | None) -> tuple[str, list[str], bool]:
    """Chooses between the card in the folder, the one on the Hub and the one written now: people's own come first.

    Args:
        folder: of what is published.
        written: the card of ours.
        on_hub: README.md of the repository, None where it has none.

    Returns:
        the card, notes, and whether it is the folder's own.

    Raises:
        PublishError: the card in the folder cannot be published.
    """
    path = folder / CARD_FILE
    # Line ends are kept: a changed one is a change.
    here = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else None
    if here is not None and not is_ours(here):
        front = check_card(here, str(path))
        return (
            here,
            [OWN_HERE] + ["README.md names no license in its front matter."] * (not front.get("license")),
            True,
        )
    check_card(written, CARD_FILE)
    if on_hub is not None and user_edited(on_hub):
        return on_hub, [OWN_THERE], False
    return written, [], False


def user_edited(card: str) -> bool:
    """Whether there is a person's work in a card: it is neither ours nor a template that nobody filled in."""
    return not is_ours(card) and not PLACEHOLDER.search(card)


def check_card(card: str, origin: str) -> dict[str, Any]:
    """Reads a card as the Hub's client does.

    Args:
        card: the content of README.md.
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
    if left := PLACEHOLDER.search(card):
        line = card.count("\n", 0, left.start()) + 1
        raise PublishError(f"{origin}, line {line}: [More Information Needed] is still there. Fill it in or drop it.")
    return front


def without_local_paths(content: Any) -> Any:
    """A copy of JSON content in which every string that is an absolute path is only its last component."""
    if isinstance(content, dict):
        return {without_local_paths(key): without_local_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_local_paths(value) for value in content]
    return shortened(content) if isinstance(content, str) else content


def shortened(text: str) -> str:
    """The last component of an absolute path; of "inherited: /a/b/c" too, which provenance says of tensors."""
    prefix, separator, rest = text.rpartition(": ")
    if not ABSOLUTE.fullmatch(rest):
        return text
    path = PureWindowsPath(rest) if rest[1:2] == ":" else PurePosixPath(rest)
    return f"{prefix}{separator}{path.name or rest}"
