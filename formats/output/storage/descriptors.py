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
        self._users: dict[str, int] = {}
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def use(self, name: str, *, create: bool = False) -> Iterator[int]:
        """An open descriptor of an existing file, or of a new one, which stays open inside the ``with``."""
        with self._changed:
            while name not in self._open:
                if self._closed:
                    raise RuntimeError("written to after the run ended")
                if len(self._open) < self._limit:
                    self._open[name] = self._folder.create(name) if create else self._folder.open(name)
                elif (idle := next((n for n in self._open if not self._users.get(n)), None)) is not None:
                    self._close(idle)
                else:
                    self._changed.wait()
            self._open.move_to_end(name)
            self._users[name] = self._users.get(name, 0) + 1
            descriptor = self._open[name]
        try:
            yield descriptor
        finally:
            with self._changed:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]
                self._changed.notify_all()

    def _close(self, name: str) -> None:
        self._folder.disk.close(self._open.pop(name), self._folder.path / name)

    def close(self, name: str) -> None:
        """Close this file, if it is open and nobody uses it."""
        with self._changed:
            if name in self._open and name not in self._users:
                self._close(name)

    def close_all(self) -> None:
        """Close everything once nobody uses it, for good: a late write must not hit a number used for another file."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
            while self._open:
                self._close(next(reversed(self._open)))
