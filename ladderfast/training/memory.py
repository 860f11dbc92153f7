"""Memory that a step gives back is kept for the next one."""

from __future__ import annotations

import ctypes
import os

# glibc's mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # it takes an int
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Tell glibc to keep the memory of freed CPU tensors for this process; returns whether it does from now on.

    By itself glibc returns what is large to the system at once, and the system clears it, page by page, when the next
    step asks for it again: of a convolutional network's step that is a tenth to nearly half. `ladderfast.Run` calls
    this. The price is that the process holds what it once needed until it ends. Settings of the user's
    (`MALLOC_..._`, `GLIBC_TUNABLES`) stay, and other C libraries are left alone.
    """
    if any(name in os.environ for name in _SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return all(mallopt(name, _LARGEST) == 1 for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
