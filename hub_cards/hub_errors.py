"""Errors of the Hub's client in words that say what to do; it raises those of several libraries, and its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from .errors import PublishError, UploadError


AGAIN = "Run the same command again: what has arrived is not sent again."


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns whatever the client raises inside into an `UploadError`; errors of ours pass."""
    try:
        yield
    except (PublishError, UploadError):
        raise
    except Exception as error:  # HTTP errors of two httpx generations, OSError, RuntimeError (Xet, LFS), ValueError
        raise UploadError(f"{repo_id}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """What went wrong and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    said = " ".join(str(error).split())
    if isinstance(error, RepositoryNotFoundError | GatedRepoError) or status in (401, 403):
        return f"the Hub refuses ({said}). Check `hf auth whoami`: the token needs write access to this repository."
    if status in (409, 412):
        return f"somebody else changed the repository meanwhile ({said}). {AGAIN}"
    if isinstance(error, ValueError):
        return f"the Hub does not take it ({said})."
    return f"the Hub could not be reached or failed ({type(error).__name__}: {said}). {AGAIN}"
