"""One shard being written: by offset, from several threads, read back and compared before it gets its name."""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qz import IOFailed
from qz.formats import files
from qz.formats.record import PIECE, WrittenFile
from qz.formats.safetensors import TensorInfo, encode_header, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096
TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where everything lies in a shard.

    ``header_size`` bytes are kept before the data section. Tensors in ``variable`` are U8, of one dimension, and lie
    last; their ``stop`` is an upper bound, and they are moved together once their true length is known.
    """

    file: str
    tensors: tuple[TensorInfo, ...]
    header_size: int
    variable: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Bytes of the file; an upper bound if there are variable tensors."""
        return self.header_size + max((tensor.stop for tensor in self.tensors), default=0)

    @property
    def fixed_size(self) -> int:
        """Bytes before the first variable tensor."""
        return self.header_size + max((t.stop for t in self.tensors if t.name not in self.variable), default=0)


class Descriptors:
    """Open descriptors of any number of files in progress, a few at a time, opened again on demand. Thread-safe."""

    def __init__(self, limit: int = 16) -> None:
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
                    self._open[path] = files.open_file(path, create=False)
                elif (idle := next((p for p in self._open if not self._users.get(p)), None)) is not None:
                    files.close(self._open.pop(idle), idle)
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
                files.close(self._open.pop(path), path)

    def close_all(self) -> None:
        """Close everything once nobody uses it, for good: a late write must not hit a number used for another file."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
            while self._open:
                path, descriptor = self._open.popitem()
                files.close(descriptor, path)


@dataclass(frozen=True, slots=True, order=True)
class _Chunk:
    start: int
    stop: int
    checksum: int


class ShardWriter:
    """A shard under its temporary name. ``write`` and ``write_variable`` may be called from several threads."""

    def __init__(
        self, folder: Path, layout: ShardLayout, descriptors: Descriptors, done: Callable[[WrittenFile], None]
    ) -> None:
        """Reserve the shard's space on disk, or raise IOFailed. ``done`` is called when it is complete and named."""
        self.layout = layout
        self._path = folder / layout.file
        self._temporary = folder / (layout.file + TEMPORARY)
        self._descriptors = descriptors
        self._done = done
        self._tensors = {tensor.name: tensor for tensor in layout.tensors}
        self._chunks: list[_Chunk] = []
        self._variable: dict[str, bytes] = {}
        self._finishing = False
        descriptor = files.open_file(self._temporary, create=True)
        try:
            files.reserve(descriptor, self._temporary, layout.size)
        finally:
            files.close(descriptor, self._temporary)

    def write(self, tensor: str, data: Any, offset: int = 0) -> None:
        """Write ``data`` (any contiguous buffer) ``offset`` bytes into a tensor. The GIL is released for the work."""
        info = self._tensors[tensor]
        view = as_bytes(data)
        if tensor in self.layout.variable or not 0 <= offset <= offset + len(view) <= info.nbytes:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit into {tensor}, {info.nbytes} bytes")
        self._put(view, self.layout.header_size + info.start + offset)

    def write_variable(self, tensor: str, data: bytes) -> None:
        """Give a variable tensor its bytes, at most as many as the layout allows."""
        if tensor not in self.layout.variable or len(data) > self._tensors[tensor].nbytes:
            raise ValueError(f"{len(data)} bytes do not fit into {tensor}, or its length is not variable")
        self._variable[tensor] = bytes(data)

    def _put(self, view: memoryview, start: int) -> None:
        if self._finishing and start >= self.layout.header_size and start < self.layout.fixed_size:
            raise RuntimeError(f"{self.layout.file} is finished already")
        if not len(view):
            return
        with self._descriptors.use(self._temporary) as descriptor:
            checksum = 0
            for piece in range(0, len(view), PIECE):
                part = view[piece : piece + PIECE]
                checksum = page_checksum(part, checksum)
                files.write(descriptor, self._temporary, part, start + piece)
            stop = start + len(view)
            if len(view) >= PIECE // 4:
                files.start_writeback(descriptor, -(-start // PAGE) * PAGE, stop // PAGE * PAGE)
        self._chunks.append(_Chunk(start, stop, checksum))  # atomic under the GIL and in free-threaded CPython

    def finish(self) -> WrittenFile:
        """Write the header, store the file durably, compare what can be read with what was written, and name it.

        Raises RuntimeError if a tensor was not written whole, IOFailed if the file reads back different.
        """
        self._finishing = True
        self._require_whole()
        tensors = self._final_tensors()
        header = encode_header(tensors, reserve=self.layout.header_size)
        self._put(memoryview(header), 0)
        self._put(
            memoryview(b"".join(self._variable[t.name] for t in tensors if t.name in self._variable)),
            self.layout.fixed_size,
        )
        size = self.layout.header_size + max((tensor.stop for tensor in tensors), default=0)
        with self._descriptors.use(self._temporary) as descriptor:
            files.truncate(descriptor, self._temporary, size)
            # Reading back comes before fsync, because the kernel goes on storing meanwhile; both see the same pages.
            digest = self._read_back(descriptor, size)
            self._require_header(descriptor, tensors, size)
            files.sync(descriptor, self._temporary)
        self._descriptors.close(self._temporary)
        files.rename(self._temporary, self._path)
        files.sync_folder(self._path.parent)
        written = WrittenFile(self.layout.file, size, digest)
        self._done(written)
        return written

    def _require_whole(self) -> None:
        position = self.layout.header_size
        for chunk in sorted(self._chunks):
            if chunk.start != position:
                what = "missing" if chunk.start > position else "written twice"
                raise RuntimeError(f"{self.layout.file}: bytes {position} to {chunk.start} are {what}")
            position = chunk.stop
        missing = self.layout.variable - self._variable.keys()
        if position != self.layout.fixed_size or missing:
            raise RuntimeError(f"{self.layout.file}: not written whole: stops at {position}, lacks {sorted(missing)}")

    def _final_tensors(self) -> list[TensorInfo]:
        position = self.layout.fixed_size - self.layout.header_size
        tensors = []
        for tensor in self.layout.tensors:
            if tensor.name in self.layout.variable:
                length = len(self._variable[tensor.name])
                tensor = replace(tensor, shape=(length,), start=position, stop=position + length)
                position += length
            tensors.append(tensor)
        return tensors

    def _read_back(self, descriptor: int, size: int) -> str:
        digest, position = hashlib.sha256(), 0
        buffer = memoryview(bytearray(PIECE))
        for chunk in sorted(self._chunks):
            checksum = 0
            for start in range(chunk.start, chunk.stop, PIECE):
                part = buffer[: min(PIECE, chunk.stop - start)]
                got = files.read(descriptor, self._temporary, part, start)
                checksum = page_checksum(part[:got], checksum)
                digest.update(part)
            if checksum != chunk.checksum:
                raise IOFailed(
                    f"{self._temporary} reads back different from what was written at {chunk.start:,}-{chunk.stop:,}. "
                    "Check the disk and the memory of this machine, then run the same command again."
                )
            position = chunk.stop
        if position != size:
            raise RuntimeError(f"{self.layout.file}: {position} bytes written, {size} expected")
        return digest.hexdigest()

    def _require_header(self, descriptor: int, tensors: list[TensorInfo], size: int) -> None:
        def read(offset: int, length: int) -> bytes:
            buffer = bytearray(length)
            return bytes(buffer[: files.read(descriptor, self._temporary, memoryview(buffer), offset)])

        found = read_header(read, size, str(self._temporary))
        if found.data_start != self.layout.header_size or found.tensors != {tensor.name: tensor for tensor in tensors}:
            raise RuntimeError(f"{self.layout.file}: its header does not read as planned")


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


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, 4 MB at a time."""
    digest, position = hashlib.sha256(), 0
    buffer = memoryview(bytearray(PIECE))
    descriptor = files.open_file(path, create=False)
    try:
        while count := files.read(descriptor, path, buffer, position):
            digest.update(buffer[:count])
            position += count
    finally:
        files.close(descriptor, path)
    return digest.hexdigest()
