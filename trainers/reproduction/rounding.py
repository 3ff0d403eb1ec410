"""What of a step's record goes into a result: chosen keys, and floats cut short, for the files are committed."""

from collections.abc import Mapping, Sequence
from typing import Any


DIGITS = 5


def kept(content: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Those of the keys that there are, rounded."""
    return {key: rounded(content[key]) for key in keys if key in content}


def rounded(content: Any) -> Any:
    """The same with floats cut to what a table can use."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, DIGITS) if isinstance(content, float) else content
