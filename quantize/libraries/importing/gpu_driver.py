"""Whether this machine may have a GPU, without torch."""

from __future__ import annotations

import ctypes
import os
import sys


def may_have_a_gpu() -> bool:
    """False where there is neither NVIDIA's driver nor AMD's, so that torch need not be imported to find none."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
