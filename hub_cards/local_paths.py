"""Takes the publisher's folders out of what is published: a path becomes its last part, everything else stays."""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


ABSOLUTE = re.compile(r"(?:~?/|[A-Za-z]:[\\/])[^\n]*")


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
