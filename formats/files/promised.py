"""What the files of a finished output have to be: their recorded sizes and SHA-256, compared while they are read.

Small files, and JSON of any size, are hashed before the first byte of them is used. Large ones are hashed by threads of
their own, beside those that read them by offset, each from its beginning; until that is done, nothing made of them is
kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from qz.formats.malformed import Malformed

Read = Callable[[str, int, memoryview], None]
"""Fills the buffer with what the file has from that offset on."""

SMALL = 8 << 20
"""Bytes: hashed at once, which takes some milliseconds."""
THREADS = 4
"""That hash large files, each file by one."""
WEIGHTS = ".safetensors"


class Promise(NamedTuple):
    """Of one file."""

    bytes: int
    sha256: str


class Promised:
    """The files of one folder. Thread-safe.

    Every method that raises, raises Malformed: a file has another size or hash, or holds weights that were not there.
    """

    def __init__(self, files: Mapping[str, Promise], record: str) -> None:
        """``files``: by their names in the folder, also those in folders inside. ``record``: what promises it."""
        self._files, self._record = files, record
        self._hashes: dict[str, Future[str]] = {}
        self._right: set[str] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool: ThreadPoolExecutor | None = None

    def inside(self, name: str) -> Promised:
        """The files of a folder in this one."""
        prefix = f"{name}/"
        inner = {file.removeprefix(prefix): each for file, each in self._files.items() if file.startswith(prefix)}
        return Promised(inner, self._record)

    def __bool__(self) -> bool:
        return bool(self._files)

    def __contains__(self, file: str) -> bool:
        return file in self._files

    def require_before(self, file: str, size: int | None, location: str, read: Read, listed: str | None = None) -> None:
        """Before something of a file is used: all of it, if it is small, otherwise its size. None: it is not there.

        ``listed``: its SHA-256, where somebody else sees to it that this is right.
        """
        if file in self._right or size is None or not self._is_promised(file, location):
            return
        promise = self._files[file]
        if size != promise.bytes:
            raise self._differs(file, location, f"it has {size:,} bytes")
        if listed is not None or size <= SMALL or file.endswith(".json"):
            self.require_hash(file, listed or self._hash(file, read), location)

    def require_hash(self, file: str, sha256: str, location: str) -> None:
        """Compare the hash of a whole file, wherever it comes from."""
        if self._is_promised(file, location) and sha256 != self._files[file].sha256:
            raise self._differs(file, location, f"its SHA-256 is {sha256}")
        self._right.add(file)

    def begin(self, files: Iterable[str], read: Read) -> None:
        """Hash these files beside whatever else is done, in this order."""
        with self._lock:
            for file in files if not self._stopped.is_set() else ():
                if file in self._right or file in self._hashes or file not in self._files:
                    continue
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="qz-promised")
                self._hashes[file] = self._pool.submit(self._hash_beside, file, read)

    def is_right(self, file: str, location: str, read: Read) -> bool:
        """Whether that is known by now; if not, it will be."""
        if file in self._right or not self._is_promised(file, location):
            return True
        self.begin([file], read)
        found = self._hashes.get(file)
        if found is None or not found.done() or self._stopped.is_set():
            return False
        self.require_hash(file, found.result(), location)
        return True

    def require(self, file: str, location: str, read: Read) -> None:
        """Wait until that is known."""
        if file not in self._right and self._is_promised(file, location):
            found = self._hashes.get(file)
            self.require_hash(file, found.result() if found is not None else self._hash(file, read), location)

    def stop(self) -> None:
        """No file is hashed beside other work any more."""
        with self._lock:
            self._stopped.set()
            pool, self._pool, self._hashes = self._pool, None, {}
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _is_promised(self, file: str, location: str) -> bool:
        if file in self._files:
            return True
        if file.endswith(WEIGHTS) and self._files:
            raise Malformed(
                "file-unrecorded",
                f"{location}/{file} is not in {self._record}: it was not there when qz finished the output. Move it "
                "away, or delete that record if the folder is as you want it.",
            )
        return False

    def _hash(self, file: str, read: Read) -> str:
        from qz.formats.files.file_hash import (
            sha256_by,  # imported here: it loads OpenSSL, and most folders have no record
        )

        return sha256_by(partial(read, file), self._files[file].bytes)

    def _hash_beside(self, file: str, read: Read) -> str:
        def read_next(file: str, offset: int, buffer: memoryview) -> None:
            if self._stopped.is_set():
                raise InterruptedError  # the hash is no longer needed
            read(file, offset, buffer)

        return self._hash(file, read_next)

    def _differs(self, file: str, location: str, how: str) -> Malformed:
        return Malformed(
            "hash-differs",
            f"{location}/{file} is not as qz wrote it: {how}, unlike in {self._record}. Get an undamaged copy; "
            "`qz verify` lists everything that differs. If you changed it on purpose, delete that record, and the "
            "files are taken as they are.",
        )
