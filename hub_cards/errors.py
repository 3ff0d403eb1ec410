"""What can go wrong while publishing, for those who call it."""

from hf_wsl.errors import RunError


class PublishError(ValueError):
    """A folder that cannot be published as it is, or options that do not fit it; nothing was sent."""


class UploadError(RunError):
    """The Hub refused, or could not be reached; the same command goes on with what is missing."""
