"""Keeps what a training step frees for the next one, instead of giving it back to the system each time."""

from __future__ import annotations

import ctypes
import platform


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tells glibc to take large blocks from its heap and to leave the heap as large as it has become.

    By default a tensor above 32 MB is a mapping of its own: every step the system hands out zeroed pages, on
    the first touch of each, and takes them back. For the whole process, from now on; does nothing with other C
    libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
