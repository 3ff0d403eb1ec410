"""The errors that a user can mend. Commands show them as one line; everything else is a fault of ours."""

import errno
import os
import re
import sys
from collections.abc import Callable, Container


class RunError(RuntimeError):
    """A run that ended early; the message says why and how to go on."""


class WorkerError(RunError):
    """A worker process died."""


# A wrong option, file or model is a ValueError (ConfigError, TokenizeError, CheckpointError, ...) or an OSError.
_USER_ERRORS = (RunError, ValueError, OSError)


def is_user_error(error: BaseException) -> bool:
    """True for what a user can mend, which is shown without a traceback."""
    return isinstance(error, _USER_ERRORS) or _is_refused_config(error) or _is_full_disk(error)


def one_line(error: BaseException, options: Container[str] | None = None) -> str:
    """The message of an error without line breaks; of a config that refuses itself, the reason alone.

    Advice to use an option that is not among the command's `options` is left out.
    """
    if _is_full_disk(error):
        return _full_disk_line(error)
    text = str(error).strip() or type(error).__name__
    if _is_refused_config(error):
        text = text.splitlines()[-1].strip().removeprefix("ValueError: ")
    named = re.match(r"The option (\w+)", advice := getattr(error, "advice", ""))
    if named and options and named[1] not in options:
        text = text.removesuffix(f" {advice}.")
    return " ".join(text.split())


def run_for_shell(work: Callable[[], object], options: Container[str] | None = None) -> int:
    """Runs `work`, on one process or on each of several; `options` are the names that the command has.

    Returns:
        The exit code: 0; the one of a SystemExit; 130 after Ctrl+C; 1 where a user can mend the error, which is then
        one line on stderr (with `HF_WSL_TRACEBACK=1` all of it is raised).
    """
    try:
        work()
    except BrokenPipeError:  # the reader of stdout has left: `hf-wsl ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if os.environ.get("HF_WSL_TRACEBACK") == "1":
            raise
        _say("interrupted; run the same command again to go on")
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if not is_user_error(error) or os.environ.get("HF_WSL_TRACEBACK") == "1":
            raise
        _say(f"error: {one_line(error, options)}")
        return 1
    return 0


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # every process meets the same error; say it once
        sys.stderr.write(f"{line}\n")


def _is_refused_config(error: BaseException) -> bool:
    """A configuration that transformers refuses; the class is looked up only where its module has been imported."""
    hub = sys.modules.get("huggingface_hub.errors")
    return hub is not None and isinstance(error, hub.StrictDataclassError)


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and pyarrow give the system's words without its number, see `modeling_wsl.files.naming_full_disk`.
    return os.strerror(errno.ENOSPC) in str(error)


def _full_disk_line(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    reason = (
        f"{name} cannot be written: the disk is full" if name else f"the disk is full: {' '.join(str(error).split())}"
    )
    return f"{reason}. Free some space, and run the same command again: it goes on"
