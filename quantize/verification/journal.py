"""What an interrupted comparison had found equal, for the next one of the very same files.

It lies in ``verified`` of the user's cache, under a name made of all that the finding depends on. Only what is equal is
kept: what differs is computed again, to be told whole. A kept name that is cut off or damaged counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qz.formats.files.regular_file import read_regular
from qz.formats.user_cache import user_cache

MOST_KEPT = 32
"""Interrupted comparisons that are kept, the newest."""
MOST_BYTES = 1 << 28
PERIOD = 1.0
"""Seconds between two writes."""


class Journal:
    """Of one comparison. Thread-safe. Where nothing can be kept, nothing is."""

    def __init__(self, bound_to: Mapping[str, Any], *, resume: bool) -> None:
        """``bound_to``: JSON values that are the same only if every file and setting is."""
        self._path = _path(bound_to)
        self._lock, self._new, self._last = threading.Lock(), list[tuple[str, str]](), time.monotonic()
        if self._path is not None and not resume:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        self.equal = frozenset(_read(self._path)) if self._path is not None and resume else frozenset[tuple[str, str]]()
        """The folder, and the weight or the large file in it, that were equal."""

    def note(self, folder: str, name: str) -> None:
        """``name`` is equal."""
        with self._lock:
            self._new.append((folder, name))
            if time.monotonic() - self._last >= PERIOD:
                self._write()

    def keep(self) -> bool:
        """Write what was noted: the comparison was interrupted. Whether something is kept."""
        with self._lock:
            self._write()
            return self._path is not None and self._path.exists()

    def forget(self) -> None:
        """All is compared, so that nothing is left to go on with."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._last = time.monotonic()
        if self._path is None or not self._new:
            return
        text = "".join(f"\n{json.dumps(entry)}\n" for entry in self._new)  # a killed run may have left half a line
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._path.exists():
                others = sorted(self._path.parent.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
                for old in others[MOST_KEPT - 1 :]:
                    old.unlink()
            with self._path.open("a") as file:
                file.write(text)
            self._new.clear()


def _path(bound_to: Mapping[str, Any]) -> Path | None:
    cache = user_cache()
    name = hashlib.sha256(json.dumps(bound_to, sort_keys=True).encode()).hexdigest()
    return cache / "verified" / name if cache is not None else None


def _read(path: Path) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    try:
        lines = read_regular(path, MOST_BYTES).splitlines()
    except OSError:
        return found
    for line in lines:
        with suppress(ValueError, TypeError, RecursionError):
            folder, name = json.loads(line)
            found.add((str(folder), str(name)))
    return found
