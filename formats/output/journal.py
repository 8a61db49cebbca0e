"""The journal beside an output in the making: what was asked for, and which shards are done. Holding it is the lock.

``<output>.partial.journal`` is made before ``<output>.partial/`` and removed after everything else, so that whoever
finds a ``.partial`` finds its journal. A line is a CRC-32 and a JSON object: the fingerprint of the run first, then
each finished shard.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import OutputRefused, TryAgain
from qz.formats.output.disk import Disk
from qz.formats.output.record import WrittenFile, as_written

if TYPE_CHECKING:
    from collections.abc import Mapping


MAX_BYTES = 64_000_000
"""Of a journal, which is read whole: some 200 bytes for each of at most 10,000 shards, and a fingerprint."""


class Journal:
    """An open, locked journal. ``add`` may be called from several threads."""

    fingerprint: dict[str, Any] | None
    """What the earlier run was asked for; None if there was none, or its journal cannot be trusted."""
    finished: dict[str, WrittenFile]
    uploaded: set[str]
    """Those of which no copy is here any more: they were sent to the Hub."""

    def __init__(self, path: Path, disk: Disk) -> None:
        """Raise TryAgain at once if another process holds it."""
        self.path, self._disk = path, disk
        self._adding = threading.Lock()
        while True:
            self._descriptor = self._disk.open_file(path, create=True)
            try:
                if not self._lock():
                    raise held_by_another(path)
                if self._disk.same_file(self._descriptor, path):  # else its owner finished and removed it meanwhile
                    self._read()
                    return
            except BaseException:
                self._disk.close(self._descriptor, path)
                raise
            self._disk.close(self._descriptor, path)

    def _lock(self) -> bool:
        """Take the lock; a second and a third time after a moment, for ``check_output`` looks at it by taking it."""
        for _ in range(2):
            if self._disk.try_lock(self._descriptor, self.path):
                return True
            time.sleep(0.02)
        return self._disk.try_lock(self._descriptor, self.path)

    def _read(self) -> None:
        self._stop = self._disk.size(self._descriptor, self.path)
        if self._stop > MAX_BYTES:
            raise OutputRefused(f"{self.path} is {self._stop:,} bytes long, so it is no journal of qz. Move it away.")
        text = bytearray(self._stop)
        self._disk.read(self._descriptor, self.path, memoryview(text), 0)
        self.fingerprint, self.finished, self.uploaded = None, {}, set()
        lines = bytes(text).split(b"\n")
        torn = len(lines.pop())
        try:
            entries: list[Any] = [parse_line(line) for line in lines[:-1]]
            try:
                entries += [parse_line(line) for line in lines[-1:]]
            except ValueError:  # power went while the last line was written
                torn += len(lines[-1]) + 1
            fingerprint = entries[0]["fingerprint"]
            finished = [as_written(entry) for entry in entries[1:]]
        except (ValueError, LookupError, TypeError):
            return
        if isinstance(fingerprint, dict):
            self.fingerprint = fingerprint
            self.finished = {file.name: file for file in finished if file.sha256}
            sent = {entry["name"]: entry.get("uploaded") is True for entry in entries[1:]}
            self.uploaded = {name for name in self.finished if sent[name]}
            self._stop -= torn
            if torn:
                self._disk.truncate(self._descriptor, self.path, self._stop)

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Forget whatever it held, and begin anew."""
        self._disk.truncate(self._descriptor, self.path, 0)
        self.finished, self.uploaded, self._stop = {}, set(), 0
        self._append({"fingerprint": fingerprint})

    def add(self, file: WrittenFile) -> None:
        """Note a finished file, durably."""
        with self._adding:
            self._append(asdict(file) | ({"uploaded": True} if file.name in self.uploaded else {}))
            self.finished[file.name] = file

    def forget(self, name: str) -> None:
        """Note that a finished file is no good after all."""
        with self._adding:
            self.finished.pop(name, None)
            self.uploaded.discard(name)
            self._append(asdict(WrittenFile(name, 0, "")))

    def _append(self, entry: Mapping[str, Any]) -> None:
        text = json.dumps(entry, sort_keys=True).encode()
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        self._disk.write(self._descriptor, self.path, memoryview(line), self._stop)
        self._disk.sync(self._descriptor, self.path)
        self._stop += len(line)

    def remove(self) -> None:
        self._disk.remove(self.path)

    def close(self) -> None:
        """Give up the lock. A late ``add`` fails: it must not hit a number used for another file."""
        with self._adding:
            descriptor, self._descriptor = self._descriptor, -1
            self._disk.close(descriptor, self.path)


def held_by_another(path: Path) -> TryAgain:
    """The error for a journal whose lock another process holds."""
    return TryAgain(
        f"Another qz is writing {path.name.removesuffix('.partial.journal')} in {path.parent}. "
        "Wait until it is done, or write elsewhere with -o/--output."
    )


def parse_line(line: bytes) -> Any:
    """The value of a line, without its end; ValueError if it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("not as it was written")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
