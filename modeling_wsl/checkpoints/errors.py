"""The errors every reader of weights raises, and JSON read so that a hostile file ends in one of them."""

import functools
import inspect
import json
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar


Function = TypeVar("Function", bound=Callable[..., Any])
MAX_JSON_BYTES = 100_000_000  # the limit the safetensors library sets for its own header


class CheckpointError(ValueError):
    """Weights that cannot be read, or must not be. The message is `<source>: <what is wrong>. <what to do>.`

    Attributes:
        source: path, Hub id, or a name in angle brackets for objects in memory.
        reason: what is wrong, without the source and the advice: one line that fits a table of refused models.
    """

    def __init__(self, source: object, reason: str, advice: str):
        super().__init__(f"{source}: {reason}. {advice}.")
        self.source = str(source)
        self.reason = reason
        self.advice = advice

    def __reduce__(self):  # a worker process sends its errors pickled; the default would pass the message alone
        return type(self), (self.source, self.reason, self.advice)


class NonFiniteWeightsError(CheckpointError):
    """A tensor holds NaN or infinite entries, and `allow_nonfinite` was not given."""


class NoWeightsError(CheckpointError):
    """A folder or repository has no weight file of a format that is read."""


class DamagedFileError(CheckpointError):
    """A file of the Hub has other bytes than the Hub states, and did not come right when it was fetched again."""


class NotTokenizableError(CheckpointError):
    """A checkpoint has no tensor that tokens could be made of."""


class PartOfModelError(CheckpointError):
    """A part of a model, whose other parts are missing or cannot be joined."""


class QuantizedError(CheckpointError):
    """Weights are stored as codes of a scheme that is not dequantized, or that do not fit each other."""


class TooFewParametersError(CheckpointError):
    """A checkpoint has fewer floating-point entries than `min_parameters`."""


def parse_json(source: object, data: bytes, what: str, *, unique_keys: bool = True) -> Any:
    """Parses JSON; with `unique_keys`, a key given twice is refused: two readers would see two different files.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, or a key given twice.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if unique_keys and len(mapping) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise CheckpointError(source, f"{what} gives the key {shorten(twice)} twice", "Write the file again")
        return mapping

    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(source, f"{what} is {len(data):,} bytes long", f"At most {MAX_JSON_BYTES:,} are read")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=checked)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = f"{what} is not valid JSON ({type(error).__name__}: {shorten(error)})"
        raise CheckpointError(source, reason, "The file is damaged or forged; fetch or write it again") from error


def read_json(path: Path, what: str, *, unique_keys: bool = True) -> Any:
    """Reads a JSON file as `parse_json` does; at most 100 MB of it."""
    with path.open("rb") as stream:
        return parse_json(path, stream.read(MAX_JSON_BYTES + 1), what, unique_keys=unique_keys)


def shorten(value: object, length: int = 120) -> str:
    """A name or message of unknown origin, quoted, without control characters, at most `length` characters."""
    text = str(value)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def check_keywords(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises a TypeError for the first `given` keyword that is not `known`, with the one that was probably meant."""
    known = list(known)
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(sorted(known))}."
            raise TypeError(f"{what} has no option {name!r}; {advice}")


def keywords_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's parameters that may be given by keyword alone."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def refuses_unknown_keywords(function: Function) -> Function:
    """Gives a function the errors of `check_keywords`: Python's own name no alternative."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_keywords(f"{function.__name__}()", kwargs, names)
        return function(*args, **kwargs)

    return checked
