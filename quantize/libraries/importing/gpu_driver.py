"""Whether this machine has a GPU, and which, without torch."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path

COMPUTE_CAPABILITY = (75, 76)
"""Attributes of a device: the major and the minor number."""


def may_have_a_gpu() -> bool:
    """False where there is neither NVIDIA's driver nor AMD's, so that torch need not be imported to find none."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def ask_meanwhile() -> None:
    """Begin to find out ``compute_capability`` in a thread: the driver takes a third of a second to start."""
    if may_have_a_gpu():
        threading.Thread(target=compute_capability, daemon=True).start()


def compute_capability() -> tuple[int, int] | None:
    """Of the first GPU that CUDA programs see; None where there is none, or torch is not built for CUDA.

    Makes no context, so it takes no memory there.
    """
    with _asking:
        return _compute_capability()


_asking = threading.Lock()


@cache
def _compute_capability() -> tuple[int, int] | None:
    if not _is_torch_built_for_cuda():
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
        done = [driver.cuInit(0), driver.cuDeviceGet(ctypes.byref(device), 0)]
        for number, attribute in zip(numbers, COMPUTE_CAPABILITY, strict=True):
            done.append(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device))
    except (OSError, AttributeError):
        return None
    return None if any(done) else (numbers[0].value, numbers[1].value)


def _is_torch_built_for_cuda() -> bool:
    """As its version.py says, which is read, not run: ``cuda: Optional[str] = '13.0'``."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]\d", text, re.MULTILINE) is not None
