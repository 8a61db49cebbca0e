"""Signals that wait: what must not be left half-done is finished first.

An interrupt may be raised in the main thread wherever Python calls, so also while a lock of Python code (a Condition, a
Semaphore, an Event) is taken or let go, which then stays taken for ever. A Lock and an RLock are C: ``with`` takes them
or not. What the main thread shares with others has one of these, and a Condition only to wait: ``Condition(lock)``.
``qz.formats.slots`` takes the place of a Semaphore.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 0.5
"""Seconds for which a signal may come again: ``uv run``, ``npm`` and ``timeout`` hand on the Ctrl-C that a terminal
sends to all of them, so that it comes twice."""


class Arrival:
    """The first signal of a process, and when it came."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._time = time.monotonic()

    def echoed_by(self, number: int) -> bool:
        """Whether a signal that comes now is this one, handed on by another program as well."""
        return number == self.number and time.monotonic() - self._time < ECHO


@contextmanager
def defer_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM waits until the end of the block; a second one ends the waiting at once,
    unless it is an echo of the first.

    Both reach the handlers that were there before, if those are Python's. Off the main thread, where no handler ever
    runs, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[Arrival] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if not waiting:
            waiting.append(Arrival(number))
        elif not waiting[0].echoed_by(number):
            first = waiting.pop().number
            restore()
            with suppress(KeyboardInterrupt):
                handlers[first](first, frame)
            handlers[number](number, frame)

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, receive)
        yield
    finally:
        restore()
        if waiting:
            handlers[waiting[0].number](waiting[0].number, None)
