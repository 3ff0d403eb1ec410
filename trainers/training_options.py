"""The options of a training command: the usual ones at once, and all of `transformers.TrainingArguments` where asked.

Importing TrainingArguments takes seconds, so a command's own dataclass repeats the ones that its help shows (a test
compares them). An option that it does not have is looked up among the others; `--help_all` shows them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hf_wsl.options import build, find_recipe, option, read_yaml


RECIPES = Path(__file__).parent / "recipes"
PRECISIONS = ("auto", "float32", "bfloat16")
OptionsType = TypeVar("OptionsType")


class TrainingOptions:
    """Base of the light options of a training: a dataclass of `option` fields."""

    @classmethod
    def widened(cls, argv: Sequence[str]) -> tuple[type, list[str]]:
        """The class that knows the options in these arguments, and the arguments; see `hf_wsl.command_line.parse`."""
        if {"--help_all", "--help-all"} & set(argv):
            return with_training_arguments(cls), ["--help"]
        names: set[str] = set()
        for word, value in zip(argv, [*argv[1:], ""], strict=True):
            name, equals, given = word.removeprefix("--").partition("=")
            if name == "config" and (path := recipe_path(given if equals else value)).is_file():
                names |= set(map(str, read_yaml(path)))
            if word.startswith("--"):
                names.add(name.replace("-", "_"))
        wide = any(_is_of_training_arguments(cls, name) for name in names)
        return with_training_arguments(cls) if wide else cls, list(argv)

    @classmethod
    def from_yaml(cls: type[OptionsType], path: str | Path, **overrides: Any) -> OptionsType:
        """Reads a recipe, a file or the bare name of a shipped one; keyword arguments outrank it.

        Raises:
            ConfigError: an unknown option, or a value that cannot work.
        """
        path = recipe_path(path)
        content = read_yaml(path)
        wide = any(_is_of_training_arguments(cls, str(name)) for name in [*content, *overrides])
        options = with_training_arguments(cls) if wide else cls
        return build(options, (str(path), content), ("keyword arguments", overrides))


def recipe_path(name: str | Path) -> Path:
    """A file as given, or a shipped recipe by its bare name (`tiny`, `hf_small`)."""
    return find_recipe(name, RECIPES)


def _is_of_training_arguments(options: type, name: str) -> bool:
    """Whether an option is one of TrainingArguments that the light dataclass lacks."""
    own = {field.name for field in dataclasses.fields(options)}
    return name not in own and name in names_of_training_arguments()


@functools.cache
def names_of_training_arguments() -> frozenset[str]:
    """The fields of TrainingArguments, read from its source: a slip of the pen must not wait for its import."""
    source = Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py")
    return frozenset(
        re.findall(r"^    ([a-z]\w*): [^\n]+ = field\(", source.read_text(encoding="utf-8"), re.MULTILINE)
    )


@functools.cache
def with_training_arguments(options: type[OptionsType]) -> type[OptionsType]:
    """`options` and the fields of TrainingArguments that it lacks, with their help and defaults. Imports transformers.

    A field that takes a dictionary or one of several types is text here, as on TrainingArguments' own command line:
    JSON, or the name of a file.
    """
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    own = {field.name for field in dataclasses.fields(options)}
    more: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(TrainingArguments):
        if field.name in own or not field.init:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = " ".join(field.metadata.get("help", "").split())
        group = None if more else "all others of transformers.TrainingArguments"
        more.append((field.name, plain_hint(hints[field.name], default), option(default, text, group=group)))
    wide = dataclasses.make_dataclass(f"All{options.__name__}", more, bases=(options,))
    wide.__module__ = options.__module__
    return wide


def plain_hint(hint: Any, default: Any) -> Any:
    """The type that the command line reads a field of TrainingArguments as."""
    kinds = set(typing.get_args(hint)) - {type(None)} or {hint}
    for kind in (bool, int, float):
        if kinds == {kind}:
            return kind if default is not None else kind | None
    return str if isinstance(default, str) else list if isinstance(default, list) else str | None
