"""The process that plans, with a library that leaves malloc the worst holes.

Of each weight a little stays where it was, like what lies between two, so that no weight fits where another has been.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, NoReturn

from qz import Unsupported
from qz.quantize.libraries.importing.work_bounds import work_bounded
from qz.quantize.libraries.process import answering

WEIGHTS, VALUES = 200, 1 << 20
"""In float32: 0.8 GB, 4 MB at a time."""
LITTLE = 32

libc = ctypes.CDLL(None)
libc.realloc.restype, libc.realloc.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]


def build(*_: Any) -> NoReturn:
    with work_bounded({str(number): (VALUES,) for number in range(WEIGHTS)}, "model"):
        libc.realloc(resized(None, 16 * VALUES), 0)  # from now on glibc, left alone, maps only what is larger
        last = resized(None, LITTLE)
        for _number in range(WEIGHTS):
            weight = resized(None, 4 * VALUES)
            resized(last, LITTLE)
            last = weight
    raise Unsupported("All weights could be made.")


def resized(address: int | None, size: int) -> int:
    found: int | None = libc.realloc(address, size)
    if found is None:
        raise MemoryError
    return found


if __name__ == "__main__":
    vars(answering)["ask_library"] = build
    answering.main(*sys.argv[1:])
    os._exit(0)
