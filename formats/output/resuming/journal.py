"""The journal beside an output in the making: what was asked for, and which shards are done. Holding it is the lock.

``<output>.partial.journal`` is made before ``<output>.partial/`` and removed after everything else, so that whoever
finds a ``.partial`` finds its journal. A line is a CRC-32 and a JSON object: the fingerprint of the run first, then
each finished file, and each finished piece of a shard that is not. The CRC tells a torn line; that it was this user who
wrote a line, its seal tells.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import zlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qz import OutputRefused, TryAgain
from qz.formats.json_files import read_json
from qz.formats.malformed import Malformed
from qz.formats.output.recorded.record import WrittenFile, as_text, as_written
from qz.formats.output.resuming.seal import is_sealed, seal
from qz.formats.output.shards.pieces import Piece, as_piece, is_piece
from qz.formats.output.shards.shard_layout import TEMPORARY
from qz.formats.output.storage.beside import JOURNAL

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qz.formats.output.storage.directory import Directory

LARGEST = 64 << 20
"""Bytes of a journal, which is read whole; a file takes about 250, a piece 30 for each of its chunks."""
HEAD = b' {"fingerprint": '
"""What follows the CRC of the first line."""


class Journal:
    """An open, locked journal. ``add`` may be called from several threads."""

    fingerprint: dict[str, Any] | None
    """What the earlier run was asked for; None if there was none, or its journal cannot be trusted."""
    finished: dict[str, WrittenFile]
    pieces: dict[str, list[Piece]]
    """Of shards that are not finished, by their name."""
    uploaded: set[str]
    """Those of which no copy is here any more: they were sent to the Hub."""
    unknown: set[str]
    """Files with a line that this user did not write."""

    def __init__(self, folder: Directory, name: str, key: bytes | None) -> None:
        """Take the lock. ``key``: of the seals; without one, all lines count.

        Raises TryAgain at once if another process holds it, and OutputRefused if what lies there is no journal, or the
        file system has no locks. A journal that was made for nothing is removed.
        """
        self.path = folder.path / name
        self._folder, self._name, self._disk, self._key = folder, name, folder.disk, key
        self._adding = threading.Lock()
        while True:
            self._descriptor, is_new = folder.open_or_create(name)
            try:
                if not self._lock():
                    raise held_by_another(self.path)
                if folder.is_same(name, self._descriptor):  # otherwise its owner has finished and removed it
                    self._read()
                    return
            except BaseException as error:
                if is_new and not isinstance(error, TryAgain):
                    folder.discard(name, self._descriptor)
                self._disk.close(self._descriptor, self.path)
                raise
            self._disk.close(self._descriptor, self.path)

    def _lock(self) -> bool:
        """Take the lock; a second and a third time after a moment, for ``check_output`` looks at it by taking it."""
        for _ in range(2):
            if self._disk.try_lock(self._descriptor, self.path):
                return True
            time.sleep(0.02)
        return self._disk.try_lock(self._descriptor, self.path)

    def _read(self) -> None:
        size = self._disk.size(self._descriptor, self.path)
        if size > LARGEST:
            raise OutputRefused(f"{self.path} is {size:,} bytes long, so it is not a journal of qz. Move it away.")
        text = bytearray(size)
        self._disk.read(self._descriptor, self.path, memoryview(text), 0)
        if not begins_as_journal(bytes(text)):
            raise OutputRefused(
                f"{self.path} is not a journal of qz, although it has the name of one. Move it away, or write "
                "elsewhere with -o/--output."
            )
        self.fingerprint, self._stop, self._mark = None, size, ""
        self.finished, self.pieces, self.uploaded, self.unknown = {}, {}, set(), set()
        found = read_journal(bytes(text), self._key)
        if found is None:
            return
        if not found.is_own and os.fstat(self._descriptor).st_uid != os.geteuid():
            raise OutputRefused(
                f"{self.path} belongs to an interrupted run of another user. Move it and "
                f"{self.path.name.removesuffix('.journal')} away, or write elsewhere with -o/--output."
            )
        self.fingerprint, self._mark = found.fingerprint, found.mark
        self.finished, self.pieces = found.finished, found.pieces
        self.uploaded, self.unknown = found.uploaded, found.unknown
        self._stop -= found.torn
        if found.torn:
            self._disk.truncate(self._descriptor, self.path, self._stop)

    def start(self, fingerprint: Mapping[str, Any]) -> None:
        """Empty the journal, and start over."""
        self._disk.truncate(self._descriptor, self.path, 0)
        self.finished, self.pieces, self.uploaded, self._stop = {}, {}, set(), 0
        entry = {"fingerprint": fingerprint}
        self._mark = seal(self._key, _encoded(entry)) if self._key is not None else ""
        self._append(entry, self._mark)

    def add(self, file: WrittenFile) -> None:
        """Note a finished file, durably."""
        with self._adding:
            self._note(asdict(file) | ({"uploaded": True} if file.name in self.uploaded else {}))
            self.finished[file.name] = file
            self.pieces.pop(file.name, None)

    def add_piece(self, piece: Piece) -> None:
        """Note, durably, what is finished of a shard; nothing where all of it is."""
        with self._adding:
            if piece.name not in self.finished:
                self._note(piece.as_entry())
                self.pieces.setdefault(piece.name, []).append(piece)

    def forget(self, name: str) -> None:
        """Note that a finished file is no good after all."""
        with self._adding:
            self.finished.pop(name, None)
            self.uploaded.discard(name)
            self._note(asdict(WrittenFile(name, 0, "")))

    def _note(self, entry: Mapping[str, Any]) -> None:
        self._append(entry, seal(self._key, *_sealed(self._mark, entry)) if self._key is not None else "")

    def _append(self, entry: Mapping[str, Any], mark: str) -> None:
        text = _encoded({**entry, "seal": mark} if mark else entry)
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        self._disk.write(self._descriptor, self.path, memoryview(line), self._stop)
        self._disk.sync(self._descriptor, self.path)
        self._stop += len(line)

    def remove(self) -> None:
        self._folder.remove(self._name)

    def close(self) -> None:
        """Give up the lock. A late ``add`` fails: it must not hit a number used for another file."""
        with self._adding:
            descriptor, self._descriptor = self._descriptor, -1
            self._disk.close(descriptor, self.path)


@dataclass(frozen=True, slots=True)
class Read:
    """What a journal says. ``mark``: the seal of its first line; ``is_own``: that is the user's; ``torn``: bytes."""

    fingerprint: dict[str, Any]
    finished: dict[str, WrittenFile]
    pieces: dict[str, list[Piece]]
    uploaded: set[str]
    unknown: set[str]
    mark: str
    is_own: bool
    torn: int


def look_into(folder: Directory, name: str, key: bytes | None) -> Read | None:
    """What a journal says that another process may hold; None if there is none, or its first line cannot be trusted."""
    descriptor, disk, path = folder.open_existing(name), folder.disk, folder.path / name
    if descriptor is None:
        return None
    try:
        text = bytearray(min(disk.size(descriptor, path), LARGEST))
        disk.read(descriptor, path, memoryview(text), 0)
    finally:
        disk.close(descriptor, path)
    return read_journal(bytes(text), key)


def read_journal(text: bytes, key: bytes | None) -> Read | None:
    """None if its first line cannot be trusted. A torn last line does not count, nor one without the seal of a key."""
    lines = text.split(b"\n")
    torn = len(lines.pop())
    try:
        entries = [_parse(line) for line in lines[:-1]]
        try:
            entries += [_parse(line) for line in lines[-1:]]
        except ValueError:  # power failed while the last line was written
            torn += len(lines[-1]) + 1
        fingerprint, mark = entries[0]["fingerprint"], str(entries[0].get("seal", ""))
        is_own = key is not None and is_sealed(mark, key, _encoded({"fingerprint": fingerprint}))
        files: dict[str, WrittenFile] = {}
        sent: dict[str, bool] = {}
        pieces: dict[str, list[Piece]] = {}
        unknown: set[str] = set()
        for entry in entries[1:]:
            counts = key is None or (is_own and is_sealed(entry.get("seal"), key, *_sealed(mark, entry)))
            if is_piece(entry):
                piece = as_piece(entry)
                if counts:
                    pieces.setdefault(piece.name, []).append(piece)
                else:
                    unknown.add(piece.name + TEMPORARY)
                continue
            file = as_written(entry)
            files[file.name], sent[file.name] = file, entry.get("uploaded") is True
            if counts:
                pieces.pop(file.name, None)
            else:
                unknown.add(file.name)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    if not isinstance(fingerprint, dict):
        return None
    kept = {name: file for name, file in files.items() if file.sha256 and name not in unknown}
    return Read(fingerprint, kept, pieces, {name for name in kept if sent[name]}, unknown, mark, is_own, torn)


def _sealed(mark: str, entry: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """What the seal of a finished file covers: the run as well, so that it is worth nothing in another journal."""
    return mark.encode(), _encoded({key: value for key, value in entry.items() if key != "seal"})


def begins_as_journal(text: bytes) -> bool:
    """Whether a file that begins so is a journal, maybe one whose first line is torn; an empty one is."""
    if not text.strip(b"\0"):  # the size reached the disk before a power failure, the data did not
        return True
    checksum, head = text[:8], text[8 : 8 + len(HEAD)]
    return re.fullmatch(b"[0-9a-f]{8}", checksum) is not None and bool(head) and HEAD.startswith(head)


def held_by_another(path: Path) -> TryAgain:
    """The error for a journal whose lock another process holds."""
    return TryAgain(
        f"Another qz is writing {path.name.removesuffix(JOURNAL)} in {path.parent}. "
        "Wait until it is done, or write elsewhere with -o/--output."
    )


def as_fingerprint(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint of a run as it is once it was written and read."""
    read: dict[str, Any] = json.loads(json.dumps(as_text(dict(value))))
    return read


def _encoded(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode()


def _parse(line: bytes) -> dict[str, Any]:
    """The value of a line, without its end; ValueError if it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("not as it was written")
    try:
        return read_json(text, "the journal")
    except Malformed as error:
        raise ValueError(str(error)) from None
