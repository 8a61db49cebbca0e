"""Bytes written in chunks, with a checksum of each, and read back to compare."""

from __future__ import annotations

import hashlib
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qz import IOFailed
from qz.formats.files.folder import PIECE
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PAGE = 4096
HASHED = 2 * PIECE
"""Bytes hashed at a time, at most, while as many are read: handing over less keeps threads waiting for each other."""


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Bytes ``[start, stop)`` of a file, and what :func:`page_checksum` says of them."""

    start: int
    stop: int
    checksum: int


def write_chunk(disk: Disk, descriptor: int, path: Path, view: memoryview, start: int) -> Chunk:
    """Write the bytes of ``view`` at ``start``, and have the kernel begin to store them if they are many."""
    checksum = 0
    for piece in range(0, len(view), PIECE):
        part = view[piece : piece + PIECE]
        checksum = page_checksum(part, checksum)
        disk.write(descriptor, path, part, start + piece)
    stop = start + len(view)
    if len(view) >= PIECE // 4:
        disk.start_writeback(descriptor, -(-start // PAGE) * PAGE, stop // PAGE * PAGE)
    return Chunk(start, stop, checksum)


def read_back(disk: Disk, descriptor: int, path: Path, chunks: Sequence[Chunk]) -> str:
    """The SHA-256 of a file that is all ``chunks``, in order; IOFailed if it does not read as it was written.

    Meanwhile the kernel stores what is not stored yet, and a thread hashes what this one has read.
    """
    stop = chunks[-1].stop if chunks else 0
    storing = threading.Thread(target=disk.start_writeback, args=(descriptor, 0, stop), kwargs={"wait": True})
    with ThreadPoolExecutor(1) as pool:
        if stop > PIECE:
            storing.start()
        try:
            hashing = _Hashing(pool, max((chunk.stop - chunk.start for chunk in chunks), default=0))
            for chunk in chunks:
                checksum = 0
                for start in range(chunk.start, chunk.stop, HASHED):
                    part = hashing.buffer(min(HASHED, chunk.stop - start))
                    got = disk.read(descriptor, path, part, start)
                    checksum = page_checksum(part[:got], checksum)
                    hashing.add(part)
                if checksum != chunk.checksum:
                    raise IOFailed(
                        f"{path} reads back different from what was written at bytes {chunk.start:,} to "
                        f"{chunk.stop:,}. Check the disk and the memory of this machine, then run the same command "
                        "again."
                    )
            return hashing.digest()
        finally:
            if stop > PIECE:
                storing.join()


def is_as_written(disk: Disk, descriptor: int, path: Path, chunk: Chunk) -> bool:
    """Whether a file still holds a chunk that an earlier run wrote."""
    buffer, checksum = memoryview(bytearray(min(PIECE, chunk.stop - chunk.start))), 0
    for start in range(chunk.start, chunk.stop, PIECE):
        part = buffer[: min(PIECE, chunk.stop - start)]
        if disk.read(descriptor, path, part, start) != len(part):
            return False
        checksum = page_checksum(part, checksum)
    return checksum == chunk.checksum


class _Hashing:
    """SHA-256 of long parts in another thread, while the next one is read into another buffer."""

    def __init__(self, pool: ThreadPoolExecutor, longest: int) -> None:
        """``longest``: bytes of the longest part."""
        self._sha256, self._pool = hashlib.sha256(), pool
        self._buffers = [memoryview(bytearray(min(longest, HASHED))) for _ in range(2)]
        self._under_way: Future[None] | None = None

    def buffer(self, length: int) -> memoryview:
        """Memory that is not being hashed."""
        return self._buffers[0][:length]

    def add(self, part: memoryview) -> None:
        """Hash what was read into ``buffer``."""
        self._wait()
        if len(part) < PIECE // 16:
            self._sha256.update(part)
        else:
            self._under_way = self._pool.submit(self._sha256.update, part)
            self._buffers.reverse()

    def digest(self) -> str:
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None


def as_bytes(data: Any) -> memoryview:
    """A flat view of the bytes of any C-contiguous buffer."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes and view.ndim else memoryview(bytes(view))


def page_checksum(data: memoryview, seed: int = 0) -> int:
    """CRC-32 of the 64-bit sums of each 4 KiB page, and of the bytes after the last whole page.

    Sees any changed word and any page that is lost, moved or repeated, as fast as memory can be read, which a CRC of
    all bytes is not everywhere. ``seed``: the checksum of the bytes before, a whole number of pages.
    """
    whole = len(data) // PAGE * PAGE
    if whole:
        words = np.frombuffer(data[:whole], np.uint64).reshape(-1, PAGE // 8)
        seed = zlib.crc32(np.add.reduce(words, axis=1), seed)
    return zlib.crc32(data[whole:], seed)


def hash_file(folder: Directory, name: str) -> str:
    """The SHA-256 of a file, 4 MB at a time."""
    digest, position = hashlib.sha256(), 0
    buffer = memoryview(bytearray(PIECE))
    path, disk = folder.path / name, folder.disk
    descriptor = folder.open(name)
    try:
        while count := disk.read(descriptor, path, buffer, position):
            digest.update(buffer[:count])
            position += count
    finally:
        disk.close(descriptor, path)
    return digest.hexdigest()
