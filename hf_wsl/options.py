"""One dataclass, three sources: defaults, a YAML file, the command line. Unknown keys are refused, never ignored.

The dataclass is the only place where an option is described: the command line's help is made of its field metadata.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml


ConfigType = TypeVar("ConfigType")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ConfigError(ValueError):
    """An option that does not exist, cannot be read, or contradicts another one."""


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field with its help text; `choices` are checked for every source."""
    metadata = {"help": help, "choices": tuple(choices) if choices else None}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(key: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError where the file is missing, malformed or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--config {path}: there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected `option: value` lines, found a {type(content).__name__}")
    return content


def build(cls: type[ConfigType], *sources: tuple[str, Mapping[str, Any]]) -> ConfigType:
    """Builds `cls` from (origin, values) pairs, later ones first in rank; dict-valued options are merged key by key.

    Args:
        cls: a dataclass whose fields were made with `option`.
        sources: pairs of a name for error messages (`"recipe.yaml"`, `"command line"`) and the values it gives.

    Raises:
        ConfigError: an unknown option (with the nearest known one), a value of the wrong type, or no choice.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for origin, given in sources:
        for key, value in given.items():
            if key not in fields:
                raise ConfigError(f"{origin}: unknown option '{key}'.{nearest(key, fields)}")
            value = coerce(value, hints[key], f"{origin}: option '{key}'")
            choices = fields[key].metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"{origin}: option '{key}' is '{value}'; choose one of {', '.join(choices)}")
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return cls(**values)


def coerce(value: Any, hint: Any, what: str) -> Any:
    """Reads `value` (from YAML, or text from the command line) as the annotated type; ConfigError where it cannot be.

    YAML 1.1 reads `2e-5` as text and people quote numbers, so text is accepted wherever its content fits.
    """
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in allowed:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        allowed = tuple(kind for kind in allowed if kind is not type(None))
    kind = allowed[0]
    text = value.strip() if isinstance(value, str) else None
    if kind is bool:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ConfigError(f"{what} takes true or false, not {value!r}")
    if kind in (int, float):
        number = None if isinstance(value, bool) else _number(value if text is None else text)
        if not _is_finite(number) or (kind is int and number != int(number)):
            raise ConfigError(f"{what} takes {'a whole' if kind is int else 'a'} number, not {value!r}")
        return kind(number)
    if kind is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{what} takes `name: value` pairs, not {value!r}")
        return {name: _entry(entry, f"{what}, '{name}'") for name, entry in value.items()}
    if kind is list:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list):
            raise ConfigError(f"{what} takes a list, or text with commas, not {value!r}")
        return [str(part).strip() for part in parts if str(part).strip()]
    if value is None:  # `author:` with nothing behind it
        return ""
    if isinstance(value, dict | list | bool):
        raise ConfigError(f"{what} takes text, not {value!r}")
    return str(value)


def _entry(value: Any, what: str) -> Any:
    """A value of a group: what reads as a number is one, and it is finite."""
    number = _number(value)
    if number is None or isinstance(value, bool):
        return value
    if not _is_finite(number):
        raise ConfigError(f"{what} takes a finite number, not {value!r}")
    return number


def _is_finite(number: float | int | None) -> bool:
    return number is not None and abs(number) <= sys.float_info.max  # false for NaN, and for integers beyond floats


def _number(value: Any) -> float | int | None:
    if isinstance(value, int | float):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            continue
    return None


def command_line(
    cls: type, argv: Sequence[str], *, program: str, description: str, example: str
) -> tuple[str | None, dict[str, Any]]:
    """Parses `--option value`, `--option=value`, `--flag` and `--group.key value` (for dict-valued options).

    Returns:
        The path given with `--config` (or None) and the options that were given, as text; `build` reads their types.

    Raises:
        ConfigError: an unknown option, with the nearest known name; a missing value.
    """
    hints = typing.get_type_hints(cls)
    groups = [name for name, hint in hints.items() if hint is dict]
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line outranks it")
    for field in dataclasses.fields(cls):
        text = field.metadata["help"].replace("%", "%%")
        if field.name in groups:
            parser.add_argument(f"--{field.name}.KEY", metavar="VALUE", help=text)
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else ",".join(map(str, factory()))
        default = "" if default in (None, "") else f" (default: {default})"
        choices = field.metadata["choices"]
        names = list(dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}")))
        flag = {"nargs": "?", "const": "true"} if hints[field.name] is bool else {}
        metavar = "|".join(choices) if choices else "VALUE"
        parser.add_argument(*names, dest=field.name, metavar=metavar, help=f"{text}{default}", **flag)

    plain, grouped = _split_groups(argv, groups)
    parsed, unknown = _parse_or_raise(parser, plain)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        known = [field.name for field in dataclasses.fields(cls)] + ["config"]
        if not unknown[0].startswith("-"):
            raise ConfigError(f"command line: unexpected argument '{unknown[0]}'; options are written --option value")
        raise ConfigError(f"command line: unknown option '--{name}'.{nearest(name.replace('-', '_'), known)}")
    given = vars(parsed)
    return given.pop("config", None), {**given, **grouped}


def build_from_command_line(
    cls: type[ConfigType],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    example: str,
    find_file: Callable[[str], str | Path] = str,
) -> ConfigType:
    """Reads `--config FILE --option value ...`; the command line outranks the file.

    Args:
        find_file: the file that `--config` names.

    Raises:
        ConfigError: see `command_line` and `build`.
    """
    path, given = command_line(cls, argv, program=program, description=description, example=example)
    sources = [("command line", given)]
    if path is not None:
        path = find_file(path)
        sources.insert(0, (str(path), read_yaml(path)))
    return build(cls, *sources)


def _split_groups(argv: Sequence[str], groups: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Takes `--group.key value` out of the arguments; values are read as YAML (numbers, true, null, text, [lists])."""
    plain: list[str] = []
    grouped: dict[str, dict[str, Any]] = {}
    arguments = iter(argv)
    for argument in arguments:
        group, dot, rest = argument.removeprefix("--").partition(".")
        if not (argument.startswith("--") and dot and group in groups):
            plain.append(argument)
            continue
        key, equals, value = rest.partition("=")
        if not equals:
            value = next(arguments, None)
            if value is None:
                raise ConfigError(f"command line: option '{argument}' needs a value")
        try:
            grouped.setdefault(group, {})[key] = value if _number(value) is not None else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: option '{argument}' cannot be read from {value!r}: {error}") from error
    return plain, grouped


def _parse_or_raise(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    def refuse(message: str) -> typing.NoReturn:
        raise ConfigError(f"command line: {message}")

    parser.error = refuse  # argparse would print its usage of sixty options and exit; one line says more
    return parser.parse_known_args(argv)
