"""The errors that a user can mend. Commands show them as one line; everything else is a fault of ours."""

from huggingface_hub.errors import StrictDataclassError


class RunError(RuntimeError):
    """A run that ended early; the message says why and how to go on."""


class WorkerError(RunError):
    """A worker process died."""


# A wrong option, file or model is a ValueError (ConfigError, TokenizeError, CheckpointError, ...) or an OSError.
USER_ERRORS = (RunError, ValueError, OSError, StrictDataclassError)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; of a config that refuses itself, the reason alone."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, StrictDataclassError):
        text = text.splitlines()[-1].strip().removeprefix("ValueError: ")
    return " ".join(text.split())
