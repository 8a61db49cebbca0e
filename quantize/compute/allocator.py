"""What this process's malloc does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""
LARGE = 1 << 20


def return_freed_memory() -> None:
    """Let every piece of a megabyte or more go back to the system when it is freed; for the life of this process.

    glibc raises that limit to 32 MB as it goes, and then keeps the blocks of a model that are done with, one after the
    other, as holes in which the next do not fit. Elsewhere than with glibc nothing is changed.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)
