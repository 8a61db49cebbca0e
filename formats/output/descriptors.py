"""Few open descriptors for many files in progress."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qz.formats.output.disk import Disk


class Descriptors:
    """Open descriptors of any number of files in progress, a few at a time, opened again on demand. Thread-safe."""

    def __init__(self, disk: Disk, limit: int = 16) -> None:
        self._disk = disk
        self._limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[Path, int] = {}
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """An open descriptor of an existing file, which stays open inside the ``with``."""
        with self._changed:
            while path not in self._open:
                if self._closed:
                    raise RuntimeError("written to after the run ended")
                if len(self._open) < self._limit:
                    self._open[path] = self._disk.open_file(path, create=False)
                elif (idle := next((p for p in self._open if not self._users.get(p)), None)) is not None:
                    self._disk.close(self._open.pop(idle), idle)
                else:
                    self._changed.wait()
            self._open.move_to_end(path)
            self._users[path] = self._users.get(path, 0) + 1
            descriptor = self._open[path]
        try:
            yield descriptor
        finally:
            with self._changed:
                self._users[path] -= 1
                if not self._users[path]:
                    del self._users[path]
                self._changed.notify_all()

    def close(self, path: Path) -> None:
        """Close this file, if it is open and nobody uses it."""
        with self._changed:
            if path in self._open and path not in self._users:
                self._disk.close(self._open.pop(path), path)

    def close_all(self) -> None:
        """Close everything once nobody uses it, for good: a late write must not hit a number used for another file."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
            while self._open:
                path, descriptor = self._open.popitem()
                self._disk.close(descriptor, path)
