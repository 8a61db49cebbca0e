"""How much memory and time a library may take to build a class, by what the checkpoint holds.

A config names counts and sizes that a library multiplies, loops over, and makes lists and tables of, on the way to
modules that can be counted. So the work itself is watched: a thread looks at what has been taken, and ends the work.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from qz import MalformedInput

BYTES, BYTES_PER_TENSOR, BYTES_PER_VALUE = 128 << 20, 64 << 10, 40
"""Of memory: in any case, for each stored tensor, and for each value of the largest, of which tables are made."""
LEAST_BYTES, IN_ALL = 64 << 20, 368 << 20
"""Of memory in a process that is for this only: it is not to grow beyond so much in all for a small checkpoint, though
the least is its in any case. With all that a library can import, 300 MB are taken before it begins; where more is taken
than is allowed in all, as by a torch for CUDA, only the bound of any process holds.
"""
OF_OTHERS = 768 << 20
"""What other threads may take meanwhile, in a process that does more than this: a GPU's context, buffers of reading."""
SECONDS, SECONDS_PER_TENSOR = 60.0, 0.02
"""Of CPU time of the thread that builds."""
RESIDENT, SHARED, DATA = 1, 2, 5
"""Places in ``/proc/self/statm``; the last is what ``RLIMIT_DATA`` counts."""
NO_MEMORY = ("allocate memory", "can't start new thread")
"""What torch and Python say of it."""
STEP, AGAIN = 0.02, 0.5
"""Seconds between two looks, and until what was raised in vain is raised again."""

_hard = False
_in_all: int | None = None


def set_hard(in_all: int | None = None) -> None:
    """Say that this process does nothing else: the system may refuse it memory beyond the bound.

    ``in_all``: bytes, with what it takes already, beyond which a small checkpoint is not to make it grow.
    """
    global _hard, _in_all
    _hard, _in_all = True, in_all


def is_hard() -> bool:
    """Whether the system enforces the bound of memory in this process."""
    return _hard


class _LimitExceeded(BaseException):
    """Raised in the middle of a library, which must not take it for an error of its own."""


@contextmanager
def work_bounded(shapes: Mapping[str, tuple[int, ...]], where: str) -> Iterator[None]:
    """Raise MalformedInput once this thread takes far more memory or time than tensors of these ``shapes`` call for."""
    watch = _Watch(*allowance(shapes.values()))
    try:
        with watch, _refused_beyond(watch.bytes):
            yield
    except _LimitExceeded:
        raise _malformed(watch, len(shapes), where) from None
    except (MemoryError, RuntimeError) as error:
        if _hard and (isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY)):
            raise _malformed(watch, len(shapes), where) from None
        raise


def allowance(shapes: Iterable[tuple[int, ...]]) -> tuple[int, float]:
    """Bytes of memory and seconds of CPU time."""
    counts = [math.prod(shape) for shape in shapes]
    always = BYTES if _hard else BYTES + OF_OTHERS
    if _in_all is not None and (room := _in_all - _memory()[RESIDENT]) > 0:
        always = max(LEAST_BYTES, min(always, room))
    return (
        always + BYTES_PER_TENSOR * len(counts) + BYTES_PER_VALUE * max(counts, default=0),
        SECONDS + SECONDS_PER_TENSOR * len(counts),
    )


def _malformed(watch: _Watch, tensors: int, where: str) -> MalformedInput:
    return MalformedInput(
        f"{where}/config.json describes a model whose building takes more than {watch.exceeded or watch.memory}, far "
        f"more than the {tensors:,} tensors there are call for. Use the config.json that belongs to these weights."
    )


class _Watch:
    """A thread that looks at what the one that made it takes, and raises ``_LimitExceeded`` there."""

    def __init__(self, most: int, seconds: float) -> None:
        self.bytes, self.seconds = most, seconds
        self.exceeded = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._watched = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._watched) if hasattr(time, "pthread_getcpuclockid") else None

    @property
    def memory(self) -> str:
        return f"{self.bytes >> 20:,} MB"

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.exceeded:  # Python 3.11 under a tracer hangs if nothing is withdrawn
            _raise_in(self._watched, None)  # withdraws the exception if it was not raised yet

    def _look(self) -> None:
        taken, used = _anonymous_bytes(), self._used()
        while not self._ended.wait(AGAIN if self.exceeded else STEP):
            if _anonymous_bytes() - taken > self.bytes:
                self.exceeded = self.memory
            elif self._used() - used > self.seconds:
                self.exceeded = f"{self.seconds:.0f} seconds"
            if self.exceeded:
                _raise_in(self._watched, _LimitExceeded)

    def _used(self) -> float:
        return time.clock_gettime(self._clock) if self._clock is not None else time.monotonic()


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None)


@contextmanager
def _refused_beyond(most: int) -> Iterator[None]:
    """Inside, in a process that is there for this only, the system refuses memory beyond what is taken and ``most``."""
    if not _hard or sys.platform != "linux":
        yield
        return
    soft, limit = resource.getrlimit(resource.RLIMIT_DATA)
    bound = _memory()[DATA] + most
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, limit))


def _anonymous_bytes() -> int:
    memory = _memory()
    return memory[RESIDENT] - memory[SHARED]


def _memory() -> list[int]:
    """Bytes that this process takes, of several kinds; zeros where the system does not tell."""
    with suppress(OSError), open("/proc/self/statm", "rb") as file:
        return [int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in file.read().split()]
    return [0] * 7
