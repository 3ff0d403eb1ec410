"""A signature at the end of the cards that hf-wsl writes: it tells whether anyone has changed one since."""

import hashlib
import re


SIGNATURE = re.compile(r"\n<!-- hf-wsl card ([0-9a-f]{16}): .*-->\n\Z")


def signed(card: str) -> str:
    """Appends a hash of the card, by which `is_ours` tells whether anyone has changed it since."""
    mark = hashlib.sha256(card.encode()).hexdigest()[:16]
    return (
        f"{card}\n<!-- hf-wsl card {mark}: written by hf-wsl; once you change anything above, it stays as it is -->\n"
    )


def is_ours(card: str) -> bool:
    """Whether this package wrote the card and nobody has changed it."""
    match = SIGNATURE.search(card)
    return match is not None and signed(card[: match.start()]) == card
