"""What the tests of interrupted runs share: a process that kills itself when it is told to, and hashes of a folder."""

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
from huggingface_hub.utils import close_session


def hashes(folder: Path) -> dict[str, str]:
    """Every file's SHA-256, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_and_die(run: Callable[[], object], at: int, places: Sequence[tuple[object, str]]) -> bool:
    """Calls `run` in a forked process that kills itself when one of `places` is called for the `at`-th time.

    Args:
        places: pairs of a module or class and the name of a function in it.

    Returns:
        whether it was killed; False: it came to its end, as there are fewer calls.
    """
    close_session()  # else both processes would talk to the Hub over one connection
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        calls = 0

        def dying(function):
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for owner, name in places:
            setattr(owner, name, dying(getattr(owner, name)))
        datasets.disable_progress_bars()
        run()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL
