"""Errors of publishing, for those who call it."""

from collections.abc import Iterator
from contextlib import contextmanager

from hf_wsl.errors import RunError
from modeling_wsl.checkpoints.hub import upload_problem


class PublishError(ValueError):
    """A folder that cannot be published as it is, or options that do not fit it; nothing was sent."""


class UploadError(RunError):
    """The Hub refused, or could not be reached; the same command goes on with what is missing."""


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns whatever the Hub's client raises inside into an `UploadError`; errors of ours pass."""
    try:
        yield
    except (PublishError, UploadError):
        raise
    except Exception as error:  # HTTP errors of two httpx generations, OSError, RuntimeError (Xet, LFS), ValueError
        reason, advice = upload_problem(error)
        raise UploadError(f"{repo_id}: {reason}. {advice}.") from error
