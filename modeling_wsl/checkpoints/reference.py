"""One line of text that names a model: a path or Hub id, and where in it the weights are.

    org/name                              a model on the Hub; timm/<name> alike
    org/name:unet#ema.model@v1            the folder `unet`, the state dict `ema.model`, the branch, tag or commit `v1`
    path/to/file.pt#state_dict_ema        one of several state dicts of a file
    path/to/file.pt#                      the tensors at its top level
    path/to/file.pt#all                   each of its state dicts, a model each
    folder:unet                           a folder in a folder

The suffixes may stand in any order, each once. A path that exists under the longer name wins: a file that is called
`a#b.pt` is named so. Within a suffix `%23`, `%3A`, `%40` and `%25` stand for `#`, `:`, `@` and `%`.
"""

import os
import re
from dataclasses import dataclass, replace

from .errors import CheckpointError, shorten


MARKS = {":": "subfolder", "#": "key", "@": "revision"}  # in the order in which a reference is written
ALL = "all"  # as key: every state dict of a file, a model each
ESCAPES = {mark: f"%{ord(mark):02X}" for mark in ("%", *MARKS)}


@dataclass(frozen=True)
class Reference:
    """A model by name; its text is `location:subfolder#key@revision`.

    Attributes:
        location: a path as it was given, or a Hub id.
        subfolder: a folder in it; empty: none.
        key: of several state dicts the one that is meant, names joined by dots; None: the only one.
        revision: branch, tag or commit of a Hub id.
    """

    location: str
    subfolder: str = ""
    key: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        given = {mark: getattr(self, name) for mark, name in MARKS.items()}
        given[":"] = self.subfolder or None
        return self.location + "".join(mark + _escaped(value) for mark, value in given.items() if value is not None)

    def with_options(self, *, subfolder: str = "", key: str | None = None, revision: str | None = None) -> "Reference":
        """This reference and what keyword arguments say beside it.

        Raises:
            CheckpointError: they say another thing than the reference does.
        """
        for name, value in {"subfolder": subfolder or None, "key": key, "revision": revision}.items():
            own = getattr(self, name) if name != "subfolder" else self.subfolder or None
            if None not in (own, value) and own != value:
                reason = f"names the {name} {shorten(own)}, and {shorten(value)} is asked for beside it"
                raise CheckpointError(self, reason, "Leave one of the two out")
        own_key = self.key if key is None else key
        return replace(self, subfolder=self.subfolder or subfolder, key=own_key, revision=self.revision or revision)


def parse_reference(source: "str | os.PathLike[str] | Reference") -> Reference:
    """Takes a reference apart; see the head of this module. Nothing is opened, and the location need not exist.

    Raises:
        CheckpointError: a suffix is given twice, or the text is an address of the web.
    """
    if isinstance(source, Reference):
        return source
    text = os.fspath(source)
    cuts = [match.start() for match in re.finditer("[:#@]", text) if match.start()]
    end = next((cut for cut in (len(text), *reversed(cuts)) if exists(text[:cut])), None)
    if end is None and "://" in text:
        advice = "Pass the Hub id (org/name), or download the file and pass its path"
        raise CheckpointError(shorten(text), "is an address of the web", advice)
    if end is None:
        end = cuts[0] if cuts else len(text)
    found: dict[str, str] = {}
    for suffix in re.findall("[:#@][^:#@]*", text[end:]):
        name, value = MARKS[suffix[0]], _unescaped(suffix[1:])
        if name in found:
            advice = f"Write {suffix[0]} in a name as {ESCAPES[suffix[0]]}"
            raise CheckpointError(text, f"names a {name} twice", advice)
        found[name] = value
    return Reference(text[:end], found.get("subfolder", ""), found.get("key"), found.get("revision") or None)


def exists(path: str) -> bool:
    """Whether there is a file, a folder or a link of that name; a name that no file can have is none."""
    try:
        return os.path.lexists(os.path.expanduser(path))
    except ValueError:  # a NUL, or a surrogate that the file system's encoding lacks
        return False


def _escaped(value: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in value)


def _unescaped(value: str) -> str:
    return re.sub("%(?:23|25|3A|40)", lambda match: chr(int(match[0][1:], 16)), value, flags=re.IGNORECASE)
