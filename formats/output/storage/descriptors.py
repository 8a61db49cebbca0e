"""Few open descriptors for many files in progress."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from qz.formats.output.storage.directory import Directory


class Descriptors:
    """Open descriptors of any number of files of one folder, a few at a time, opened again on demand. Thread-safe."""

    def __init__(self, folder: Directory, limit: int = 16) -> None:
        self._folder, self._limit = folder, limit
        self._open: OrderedDict[str, int] = OrderedDict()
        self._uses: list[tuple[str, int]] = []
        """Of each use under way: the file, and the thread."""
        self._closed = False
        self._lock = threading.RLock()
        """What ``with`` takes, not the condition: see ``signals``."""
        self._changed = threading.Condition(self._lock)

    @contextmanager
    def use(self, name: str, *, create: bool = False) -> Iterator[int]:
        """An open descriptor of an existing file, or of a new one, which stays open inside the ``with``."""
        with self._lock:
            while name not in self._open:
                if self._closed:
                    raise RuntimeError("written to after the run ended")
                if len(self._open) < self._limit:
                    self._open[name] = self._folder.create(name) if create else self._folder.open(name)
                elif (idle := next((n for n in self._open if not self._is_used(n)), None)) is not None:
                    self._close(idle)
                else:
                    self._changed.wait()
            self._open.move_to_end(name)
            use = name, threading.get_ident()
            self._uses.append(use)
            descriptor = self._open[name]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._uses.remove(use)
                self._changed.notify_all()

    def _is_used(self, name: str) -> bool:
        return any(used == name for used, _ in self._uses)

    def _close(self, name: str) -> None:
        self._folder.disk.close(self._open.pop(name), self._folder.path / name)

    def close(self, name: str) -> None:
        """Close this file, if it is open and not in use."""
        with self._lock:
            if name in self._open and not self._is_used(name):
                self._close(name)

    def close_all(self) -> None:
        """Close all for good, once no other thread uses them: a late write must not hit a number used for another file.

        Uses of this thread are not waited for: one that is still noted was left by an interrupt.
        """
        own = threading.get_ident()
        with self._lock:
            self._closed = True
            self._changed.wait_for(lambda: all(thread == own for _, thread in self._uses))
            while self._open:
                self._close(next(reversed(self._open)))
