"""Settings of a library that are the whole process's: changed while qz works, and then as they were found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_lock = threading.RLock()
_at_work = 0
_undo: dict[object, Callable[[], None]] = {}


@contextmanager
def settings_restored() -> Iterator[None]:
    """Inside, settings may be changed; they are given back by the last of those that are inside at the same time."""
    global _at_work
    with _lock:
        _at_work += 1
    try:
        yield
    finally:
        with _lock:
            _at_work -= 1
            while not _at_work and _undo:
                _undo.popitem()[1]()


def change_global(what: object, change: Callable[[], Callable[[], None]]) -> None:
    """Call ``change``, which returns what undoes it, unless ``what`` is changed already."""
    with _lock:
        if what in _undo:
            return
        undo = change()
        if _at_work:
            _undo[what] = undo
