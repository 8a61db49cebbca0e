"""Signals that wait: what must not be left half-done is finished first.

An interrupt may be raised in the main thread wherever Python calls, so also while a lock of Python code (a Condition, a
Semaphore, an Event) is taken or let go, which then stays taken for ever. A Lock and an RLock are C: ``with`` takes them
or not. What the main thread shares with others has one of these, and a Condition only to wait: ``Condition(lock)``.
``qz.formats.slots`` takes the place of a Semaphore.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM waits until the end of the block; a second one ends the waiting at once.

    Both reach the handlers that were there before, if those are Python's. Off the main thread, where no handler ever
    runs, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) == 2:
            first = waiting[0]
            waiting.clear()
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
            handlers[waiting[0]](waiting[0], None)
