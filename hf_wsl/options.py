"""The options of a command: fields of a dataclass, filled from defaults, a YAML file and the command line.

    @dataclass(frozen=True)
    class GreetOptions:
        EXAMPLE = "hf-wsl greet Ada Grace --times 2"

        names: list = argument("Whom to greet.")
        times: int = option(1, "Greetings for each.")
        data: dict = option({}, "Of the images.", of=(ImageDataConfig,))  # --data.images DIR, with types and help

The fields are the only place where an option is described. Unknown names are refused, never ignored. Nothing heavy is
imported here, nor by a module that defines options: `--help` must not wait for torch. `command_line.py` reads the
arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar


ConfigType = TypeVar("ConfigType")

REQUIRED = dataclasses.MISSING
# Of every command that runs a backbone; `modeling_wsl.backbone.inference` says the same, after heavy imports.
PRECISIONS = ("auto", "float32", "bfloat16")
PRECISION_HELP = "Arithmetic of the backbone; auto: the faster one for weights in bfloat16, else that of the weights."
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ConfigError(ValueError):
    """An option that does not exist, cannot be read, or contradicts another one."""


def option(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    metavar: str | None = None,
    group: str | None = None,
    short: str | None = None,
    of: Sequence[type] = (),
    hidden: Sequence[str] = (),
    was: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: the value where nobody gives one; `REQUIRED`: somebody must.
        help: a sentence for `--help`.
        choices: the values that it takes; checked for every source.
        metavar: the kind of value that help shows, DIR or SIZE for example; by default the type.
        group: heading in the help, of this field and of the following ones, up to the next that names a group.
        short: one letter, for `-y`.
        of: of a dict: dataclasses whose fields are its keys, so that these are checked and shown in the help.
        hidden: keys of `of` that help leaves out, since another option sets them.
        was: earlier names, which are refused with the new one.
        also: other names, which are taken for this one.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices else None, "metavar": metavar, "group": group}
    metadata |= {"short": short, "of": tuple(of), "hidden": tuple(hidden), "was": tuple(was), "positional": False}
    metadata["also"] = tuple(also)
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, kw_only=default is REQUIRED)


def argument(help: str, default: Any = REQUIRED, *, metavar: str | None = None) -> Any:
    """A dataclass field that is given by its place, before or after the options; a list takes all that is left."""
    field = option(default, help, metavar=metavar)
    field.metadata = types.MappingProxyType({**field.metadata, "positional": True})
    return field


def nearest(key: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def read_yaml(path: str | Path, named_by: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file, which the option `named_by` names.

    Raises:
        ConfigError: the file is missing, malformed or not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{named_by} {path}: there is no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{named_by} {path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{named_by} {path}: expected `option: value` lines, not a {type(content).__name__}")
    return content


def find_recipe(name: str | Path, folder: Path) -> Path:
    """A file as given, or `folder/<name>.yaml`; else the path as given, for `read_yaml` to refuse."""
    shipped = folder / f"{name}.yaml"
    return shipped if not Path(name).is_file() and shipped.is_file() else Path(name)


def build(cls: type[ConfigType], *sources: tuple[str, Mapping[str, Any]]) -> ConfigType:
    """Builds `cls` from (origin, values) pairs, later ones first in rank; dict-valued options are merged key by key.

    Args:
        cls: a dataclass whose fields were made with `option`.
        sources: pairs of a name for error messages (`"recipe.yaml"`, `"command line"`) and the values it gives.

    Raises:
        ConfigError: an unknown option (with the nearest known one), a value of the wrong type, no choice, or a
            required option that nobody gives.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    aliases = other_names(fields, "also")
    values: dict[str, Any] = {}
    for origin, given in sources:
        for key, value in given.items():
            key = aliases.get(key, key)
            if key not in fields:
                now = other_names(fields, "was").get(key)
                advice = f" It is '{now}' now." if now else nearest(str(key), fields)
                raise ConfigError(f"{origin}: unknown option '{key}'.{advice}")
            metadata = fields[key].metadata
            if metadata["of"] and isinstance(value, Mapping):
                value = _coerce_keys(value, metadata["of"], f"{origin}: option '{key}': ")
            else:
                value = coerce(value, hints[key], f"{origin}: option '{key}'")
            if metadata["choices"] and value is not None and value not in metadata["choices"]:
                choices = ", ".join(metadata["choices"])
                raise ConfigError(f"{origin}: option '{key}' is '{value}'; choose one of {choices}")
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    missing = [field for field in fields.values() if is_required(field) and field.name not in values]
    if missing:
        names = ", ".join(
            f"'{field.name}'" if field.metadata["positional"] else f"'{field.name}' (--{field.name} ...)"
            for field in missing
        )
        raise ConfigError(f"option {names} is missing" if len(missing) == 1 else f"options {names} are missing")
    return cls(**values)


def part_of(options: Any, cls: type[ConfigType]) -> ConfigType:
    """The fields of `cls`, with the values that `options`, of a class with more fields, has."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def is_required(field: dataclasses.Field) -> bool:
    return field.default is REQUIRED and field.default_factory is REQUIRED


def _coerce_keys(values: Mapping[str, Any], classes: Sequence[type], origin: str) -> dict[str, Any]:
    known = keys_of(classes)
    aliases = other_names({name: field for name, (field, _) in known.items()}, "also")
    values = {aliases.get(key, key): value for key, value in values.items()}
    renamed = other_names({name: field for name, (field, _) in known.items()}, "was")
    for key in values:
        if key not in known:
            advice = f" It is '{renamed[key]}' now." if key in renamed else nearest(str(key), known)
            raise ConfigError(f"{origin}unknown option '{key}'.{advice}")
    return {key: coerce(value, known[key][1], f"{origin}option '{key}'") for key, value in values.items()}


def other_names(fields: Mapping[str, dataclasses.Field], kind: str) -> dict[str, str]:
    """Other names of fields, by the metadata "was" or "also", each with the name of now."""
    return {other: name for name, field in fields.items() for other in field.metadata[kind]}


def keys_of(classes: Sequence[type]) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Name -> field and type, of the fields of these classes; the first class that has a name decides."""
    known: dict[str, tuple[dataclasses.Field, Any]] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            known.setdefault(field.name, (field, hints[field.name]))
    return known


def plain_type(hint: Any) -> Any:
    """`int` of `int | None`, `list` of `list[float]`."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return typing.get_origin(hint) or hint


def coerce(value: Any, hint: Any, what: str) -> Any:
    """Reads `value` (from YAML, or text from the command line) as the annotated type; ConfigError where it cannot be.

    YAML 1.1 reads `2e-5` as text and people quote numbers, so text is accepted wherever its content fits.

    Args:
        value: anything.
        hint: bool, int, float, str, Path, dict, list, list[T], or one of these with `| None`.
        what: names the option in the error.
    """
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in allowed:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(kind for kind in allowed if kind is not type(None))
    kind = typing.get_origin(hint) or hint
    text = value.strip() if isinstance(value, str) else None
    if kind is bool:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise ConfigError(f"{what} takes true or false, not {value!r}")
    if kind in (int, float):
        number = None if isinstance(value, bool) else as_number(value if text is None else text)
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
        inner = typing.get_args(hint) or (str,)
        return [coerce(part, inner[0], what) for part in (str(part).strip() for part in parts) if part]
    if value is None:  # `author:` with nothing behind it
        return kind()
    if isinstance(value, dict | list | bool):
        raise ConfigError(f"{what} takes text, not {value!r}")
    return Path(value).expanduser() if kind is Path else str(value)


def _entry(value: Any, what: str) -> Any:
    """A value of a group: what reads as a number is one, and it is finite."""
    number = as_number(value)
    if number is None or isinstance(value, bool):
        return value
    if not _is_finite(number):
        raise ConfigError(f"{what} takes a finite number, not {value!r}")
    return number


def _is_finite(number: float | int | None) -> bool:
    return number is not None and abs(number) <= sys.float_info.max  # false for NaN, and for integers beyond floats


def as_number(value: Any) -> float | int | None:
    if isinstance(value, int | float):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except (TypeError, ValueError):
            continue
    return None
