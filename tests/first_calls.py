"""The first calls of kernels by eight threads at once, in processes that have never called one.

    python tests/first_calls.py --runs 500 --fresh

Threads are switched between as often as Python can, and each run is a fork of a process that has imported numba but
called nothing. With ``--fresh`` every one compiles anew, into a cache of its own; without, what the first compiled is
loaded. Ends with 1 if a call in any run raised, or gave other bytes than one thread gets.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 8


def calls(kernels: Any) -> list[Callable[[], bytes]]:
    """Calls of kernels with arrays that may be written and not, aligned and not, as a run has them."""
    bits = np.arange(64, dtype=np.uint16)
    frozen = bits.copy()
    frozen.setflags(write=False)
    crooked = np.frombuffer(bytearray(129), np.uint8)[1:].view(np.uint16)
    codes = np.arange(-32, 32, dtype=np.int8).reshape(4, 16)
    scales = np.linspace(1, 2, 4, dtype=np.float32)

    def casting(source: NDArray[np.uint16]) -> Callable[[], bytes]:
        def call() -> bytes:
            out = np.empty(64, np.uint16)
            kernels.cast(source, "F16", "BF16", out)
            return out.tobytes()

        return call

    def dequantizing() -> bytes:
        out = np.empty((4, 16), np.float32)
        kernels.dequantize_int8(codes, scales, "F32", out)
        return out.tobytes()

    return [casting(bits), casting(frozen), casting(crooked), dequantizing]


def race() -> int:
    """What eight threads get that begin at the same moment; 0 if all of them get the same and nothing is raised."""
    from qz.quantize.compute import kernels

    work = calls(kernels)
    sys.setswitchinterval(1e-6)
    start = threading.Barrier(THREADS)
    found: list[list[bytes]] = []
    raised: list[str] = []

    def thread(number: int) -> None:
        first = number % len(work)
        start.wait()
        try:
            results = [call() for call in (*work[first:], *work[:first])]
            found.append(results[len(work) - first :] + results[: len(work) - first])
        except Exception:
            raised.append(traceback.format_exc())

    threads = [threading.Thread(target=thread, args=(number,)) for number in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    sys.setswitchinterval(0.005)
    alone = [call() for call in work]
    for text in raised:
        print(text, file=sys.stderr)
    return int(bool(raised) or any(results != alone for results in found))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        import numba

        importlib.import_module("qz.quantize.compute.cpu.numba_kernels")
        for number in range(options.runs):
            if options.fresh:
                numba.config.CACHE_DIR = str(Path(folder) / str(number))
            child = os.fork()
            if child == 0:
                os._exit(race())
            failed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    print(f"{failed} of {options.runs} runs failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
