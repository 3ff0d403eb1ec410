"""What a command of this package does for a shell, on one process or on each of several."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import USER_ERRORS, one_line


def run_for_shell(main: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None) -> int:
    """`main(argv)`, and 0; or 1, where a user can mend the error: it is one line on stderr (with `HF_WSL_TRACEBACK=1`
    all of it is raised)."""
    try:
        main(argv)
    except USER_ERRORS as error:
        if os.environ.get("HF_WSL_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":  # every process meets the same error; say it once
            sys.stderr.write(f"error: {one_line(error)}\n")
        return 1
    return 0
