"""The ground that all packages share, and the door: options, files, errors, workers, and the command line."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # on demand, for the command starts faster without it

    return version("hf-wsl")
