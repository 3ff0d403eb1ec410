"""The command line: a dataclass of `option` fields becomes a parser, its help and its errors.

    options = parse(GreetOptions, ["Ada", "--times", "2"], program="hf-wsl greet")
    sys.exit(run_command(GreetOptions, "package.module:greet", program="hf-wsl greet"))  # what the shell gets

Options are written with dashes or underscores, in full. Lists are repeated, or separated by commas. Nothing heavy is
imported here: help and errors must not wait for torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import run_for_shell
from .options import (
    FALSE,
    TRUE,
    ConfigError,
    ConfigType,
    as_number,
    build,
    find_recipe,
    is_required,
    keys_of,
    nearest,
    plain_type,
    read_yaml,
)


PACKAGES = ("hf_wsl", "modeling_wsl", "datasets_scripts", "trainers", "hub_cards")
_MAX_WIDTH, _LONG_CHOICES = 119, 60
_GENERAL = {"verbose": ("-v", "Log more."), "quiet": ("-q", "Log warnings only, and show no progress bars.")}


def run_command(
    options: type | str,
    function: Callable[[Any], Iterable[str] | None] | str,
    argv: Sequence[str] | None = None,
    *,
    program: str,
    summary: str = "",
) -> int:
    """Does what a shell asks for: reads the options, sets the log's level, calls the function, prints its lines.

    Args:
        options: a dataclass of `option` fields, or `"module:name"` of one, which is imported now.
        function: takes the options and returns lines to print as they come, or None; or `"module:name"` of one, which
            is imported when the options have been read.
        argv: the arguments; by default those of the process.
        program, summary: see `parse`.

    Returns:
        The exit code; an error that a user can mend is 1 and one line on stderr (see `run_for_shell`).
    """

    names: set[str] = set()  # of the options, when they are known

    def work() -> None:
        read, levels = _read(_load(options), sys.argv[1:] if argv is None else argv, program, summary)
        set_log_level(**levels)
        names.update(field.name for field in dataclasses.fields(read))
        check_output(read)
        for line in _load(function)(read) or ():
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    return run_for_shell(work, names)


def parse(cls: type[ConfigType], argv: Sequence[str], *, program: str, summary: str = "") -> ConfigType:
    """Reads arguments, options and `--config FILE`; the command line outranks the file.

    A class attribute `EXAMPLE` is shown in the help; with `RECIPES`, a folder, `--config` takes the bare name of a
    YAML file in it. A class method `widened` takes the arguments, and gives the class that knows their options and the
    arguments that are to be read.

    Args:
        cls: a dataclass of `option` and `argument` fields.
        argv: without the name of the program.
        program: its name, for the help.
        summary: a sentence for the help.

    Raises:
        ConfigError: an unknown option, with the nearest known one; a value that is missing or of the wrong type; an
            argument too many; whatever the class itself refuses.
        SystemExit: after `--help`.
    """
    return _read(cls, argv, program, summary)[0]


def check_output(options: Any) -> None:
    """Looks at what the fields `output_dir` and `output_file` name, before hours of work.

    A folder is looked into by the command itself, see `RunFolder`. A file that is there stays as it is unless the
    options have `overwrite_output_file`.

    Raises:
        ConfigError: it cannot be written, or the file is there already; the message names another way.
    """
    for name in ("output_dir", "output_file"):
        if not (given := getattr(options, name, None)):
            continue
        path = Path(given).expanduser().absolute()
        if name == "output_file" and path.is_dir():
            raise ConfigError(f"option '{name}': {given} is a folder; name a file in it")
        if name == "output_file" and path.exists() and not getattr(options, "overwrite_output_file", False):
            raise ConfigError(
                f"option '{name}': {given} is there already. Name another file, or overwrite this one with "
                "--overwrite_output_file"
            )
        first = path.parent if name == "output_file" else path
        folder = next(folder for folder in (first, *first.parents) if folder.exists())
        if not folder.is_dir():
            raise ConfigError(f"option '{name}': {folder} is a file, so nothing can be written in it")
        try:
            tempfile.TemporaryFile(dir=folder).close()  # what the system says of permissions is not true everywhere
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"option '{name}': nothing can be written in {folder} ({reason}). Name another folder"
            ) from error


def set_log_level(verbose: bool = False, quiet: bool = False) -> None:
    """Sets up the log of this process on stderr; `quiet` also hides progress bars, here and in worker processes."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)
    if quiet:  # the variables for libraries that are not imported yet
        os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
        if "huggingface_hub" in sys.modules:
            sys.modules["huggingface_hub"].utils.disable_progress_bars()
        if "transformers" in sys.modules:
            sys.modules["transformers"].logging.disable_progress_bar()
            sys.modules["transformers"].logging.set_verbosity_error()


def _load(name: Any) -> Any:
    """The object that "module:name" names; anything else as it is."""
    if not isinstance(name, str):
        return name
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _read(
    cls: type[ConfigType], argv: Sequence[str], program: str, summary: str
) -> tuple[ConfigType, dict[str, bool]]:
    """The options, and those of `_GENERAL` that were given."""
    if hasattr(cls, "widened"):  # a class that knows more options than its help shows
        cls, argv = cls.widened(argv)
    parser = _Parser(cls, program, summary)
    given = parser.read(argv)
    levels = {name: given.pop(name) for name in _GENERAL if name in given}
    sources = [("command line", given)]
    if "config" in given:
        path = parser.find_config(given.pop("config"))
        sources.insert(0, (str(path), read_yaml(path)))
    return build(cls, *sources), levels


class _Parser:
    """The arguments of one dataclass. Names are checked here, where the nearest known one can be told; argparse
    assigns the values and lays out the help."""

    def __init__(self, cls: type, program: str, summary: str) -> None:
        self.cls, self.program = cls, program
        hints = typing.get_type_hints(cls)
        self.fields = {field.name: field for field in dataclasses.fields(cls)}
        self.positional = [name for name, field in self.fields.items() if field.metadata["positional"]]
        self.free = [  # dicts that take any key
            name for name, hint in hints.items() if plain_type(hint) is dict and not self.fields[name].metadata["of"]
        ]
        self.usage = self._usage(hints)
        self.kinds: dict[str, Any] = {"config": str}
        self.renamed: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.parser = argparse.ArgumentParser(
            prog=program,
            usage=self.usage.replace("%", "%%"),
            description=summary or None,
            epilog=f"Example:\n  {example}" if (example := getattr(cls, "EXAMPLE", "")) else None,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,
        )
        self.parser.error = _refuse
        for name in self.positional:
            nargs = "*" if plain_type(hints[name]) is list else "?"
            field = self.fields[name]
            self.parser.add_argument(name, nargs=nargs, metavar=self._metavar(field, str), help=_help(field, str))
        group = self.parser.add_argument_group("options")
        for name, field in self.fields.items():
            if title := field.metadata["group"]:
                group = self.parser.add_argument_group(title)
            self.renamed |= dict.fromkeys(field.metadata["was"], name)
            self.aliases |= dict.fromkeys(field.metadata["also"], name)
            if field.metadata["of"]:
                inner = self.parser.add_argument_group(f"--{name}", field.metadata["help"])
                for key, (part, hint) in keys_of(field.metadata["of"]).items():
                    self._add(inner, f"{name}.{key}", part, hint, shown=key not in field.metadata["hidden"])
                    self.aliases |= {f"{name}.{other}": f"{name}.{key}" for other in part.metadata["also"]}
            elif name in self.free:
                group.add_argument(f"--{name}.KEY", metavar="VALUE", help=_help(field, str))
            elif name not in self.positional:
                self._add(group, name, field, hints[name])
        self._add_general()

    def _usage(self, hints: Mapping[str, Any]) -> str:
        words = [self.program, "[options]"]
        for name in self.positional:
            text = name.upper() + (" ..." if plain_type(hints[name]) is list else "")
            words.append(text if is_required(self.fields[name]) else f"[{text}]")
        return " ".join(words)

    def _metavar(self, field: dataclasses.Field, hint: Any) -> str:
        metadata = field.metadata
        if metadata["metavar"] or metadata["positional"]:
            return metadata["metavar"] or field.name.upper()
        if metadata["choices"] and len("|".join(metadata["choices"])) <= _LONG_CHOICES:
            return "|".join(metadata["choices"])
        kind = plain_type(hint)
        if kind is list:
            inner = (typing.get_args(hint) or (str,))[0]
            return f"{_TYPE_NAMES[inner]},..."
        return _TYPE_NAMES[kind]

    def _add(self, group: Any, name: str, field: dataclasses.Field, hint: Any, shown: bool = True) -> None:
        short = [f"-{field.metadata['short']}"] if field.metadata["short"] else []
        kind = self.kinds[name] = plain_type(hint)
        text = _help(field, hint) if shown else argparse.SUPPRESS
        shape = {"action": "append"} if kind is list else {"nargs": "?", "const": "true"} if kind is bool else {}
        group.add_argument(*short, f"--{name}", dest=name, metavar=self._metavar(field, hint), help=text, **shape)

    def _add_general(self) -> None:
        group = self.parser.add_argument_group("general")
        text = "YAML file of these options; the command line outranks it."
        if recipes := self._recipes():
            text = f"YAML file of these options, or a recipe: {', '.join(recipes)}. The command line outranks it."
        group.add_argument("--config", metavar="FILE", help=text)
        for name, (short, text) in _GENERAL.items():
            group.add_argument(short, f"--{name}", action="store_true", help=text)
        group.add_argument("-h", "--help", action="help", help="Show this help.")
        if hasattr(self.cls, "widened"):
            group.add_argument("--help_all", action="help", help="Show all options, also those that few runs need.")

    def _recipes(self) -> list[str]:
        """The shipped files whose options are all of this command."""
        folder = getattr(self.cls, "RECIPES", None)
        if folder is None:
            return []
        return [path.stem for path in sorted(folder.glob("*.yaml")) if read_yaml(path).keys() <= self.fields.keys()]

    def find_config(self, name: str) -> Path:
        """The file that `--config` names.

        Raises:
            ConfigError: neither a file nor a recipe; it lists the recipes.
        """
        folder = getattr(self.cls, "RECIPES", None)
        path = Path(name).expanduser() if folder is None else find_recipe(name, folder)
        if not path.is_file() and folder is not None:
            recipes = self._recipes()
            raise ConfigError(
                f"--config {name}: there is no such file, and no recipe of that name.{nearest(str(name), recipes)} "
                f"The recipes are {', '.join(recipes)}"
            )
        return path

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options that were given, as text; `build` reads their types.

        Raises:
            ConfigError: see `parse`.
        """
        options: list[str] = []
        places: list[str] = []
        grouped: dict[str, dict[str, Any]] = {}
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word == "--":
                places += rest
                break
            if word in ("-h", "--help"):
                options = ["--help"]
                break
            if not word.startswith("-") or word == "-":
                places.append(word)
            elif not word.startswith("--"):
                options.append(word)
            else:
                name, equals, value = word[2:].partition("=")
                group, dot, key = name.partition(".")
                if dot and group.replace("-", "_") in self.free:
                    value = value if equals else self._value(name, rest)
                    grouped.setdefault(group.replace("-", "_"), {})[key] = _yaml_value(name, value)
                    continue
                options.append(self._long_option(name, value if equals else None, rest))
        given = vars(self._assign(options, places))
        for name, value in list(given.items()):
            if isinstance(value, list) and name not in self.positional:
                given[name] = [part for text in value for part in text.split(",")]
            group, dot, key = name.partition(".")
            if dot:
                grouped.setdefault(group, {})[key] = given.pop(name)
        return {**given, **grouped}

    def _assign(self, options: list[str], places: list[str]) -> argparse.Namespace:
        parsed, unknown = self.parser.parse_known_args([*options, "--", *places] if places else options)
        unknown = [word for word in unknown if word != "--"]  # some versions of argparse give it back
        if unknown:
            if unknown[0].startswith("-") and unknown[0] not in places:
                raise ConfigError(f"command line: unknown option '{unknown[0]}'. {self._advice()}")
            raise ConfigError(
                f"command line: unexpected argument '{unknown[-1]}'; options are written --option value. "
                f"{self._advice()}"
            )
        return parsed

    def _long_option(self, given: str, value: str | None, rest: list[str]) -> str:
        """`--name=value`, the name as the dataclass spells it; a value that is needed is taken from the rest."""
        name = given.replace("-", "_")
        name = self.aliases.get(name, name)
        if name in _GENERAL and value is None:
            return f"--{name}"
        if name.startswith("no_") and self.kinds.get(name[3:]) is bool and value is None:
            return f"--{name[3:]}=false"
        if name not in self.kinds:
            raise ConfigError(self._unknown(given, name))
        if value is None and self.kinds[name] is bool:
            value = rest.pop(0) if rest and rest[0].lower() in TRUE + FALSE else "true"
        return f"--{name}={self._value(name, rest) if value is None else value}"

    def _unknown(self, given: str, name: str) -> str:
        if name in self.renamed:
            return f"command line: unknown option '--{given}'. It is '--{self.renamed[name]}' now."
        if name in self.positional:
            return f"command line: unknown option '--{given}'. It is given by its place: {self.usage}"
        known = [*self.kinds, *_GENERAL, *(f"{group}.KEY" for group in self.free)]
        meant = nearest(f"--{name}", [f"--{option}" for option in known])
        return f"command line: unknown option '--{given}'.{meant} {self._advice()}"

    def _advice(self) -> str:
        return f"`{self.program} --help` lists all."

    @staticmethod
    def _value(name: str, rest: list[str]) -> str:
        if not rest or rest[0].startswith("--"):
            raise ConfigError(f"command line: option '--{name}' needs a value")
        return rest.pop(0)


def terminal_width() -> int:
    """Characters of a line of help."""
    return max(40, min(shutil.get_terminal_size().columns, _MAX_WIDTH) - 1)


_TYPE_NAMES = {bool: "[true|false]", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps everything to the terminal and cuts nothing."""

    def __init__(self, prog: str) -> None:
        width = terminal_width()
        super().__init__(prog, max_help_position=min(32, width // 3), width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-y, --yes [true|false]`: the kind of value once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("Example:"):
            return text  # to be copied, so not wrapped
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _help(field: dataclasses.Field, hint: Any) -> str:
    text, choices = field.metadata["help"], field.metadata["choices"]
    if choices and len("|".join(choices)) > _LONG_CHOICES:
        text = f"{text.rstrip('.')}; one of {', '.join(choices)}."
    if is_required(field):
        text += " (required)"
    else:
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if isinstance(default, list):
            default = ",".join(map(str, default))
        elif isinstance(default, bool):
            default = str(default).lower()
        if default not in (None, "", {}):
            text += f" (default: {default})"
    return text.replace("%", "%%")


def _yaml_value(name: str, value: str) -> Any:
    """A value of a group that takes any key: numbers, true, null, text and [lists], as YAML reads them."""
    import yaml

    try:
        return value if as_number(value) is not None else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"command line: option '--{name}' cannot be read from {value!r}: {error}") from error


def _refuse(message: str) -> typing.NoReturn:
    """In place of argparse's error, which would print its usage and exit; one line says more."""
    raise ConfigError(f"command line: {re.sub('^argument ', 'option ', message)}")
