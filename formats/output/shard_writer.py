"""One shard being written: by offset, from several threads, read back and compared before it gets its name."""

from __future__ import annotations

import hashlib
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qz import IOFailed, MalformedInput
from qz.formats.output.descriptors import Descriptors
from qz.formats.output.directory import Directory
from qz.formats.output.disk import Disk
from qz.formats.output.record import PIECE, WrittenFile
from qz.formats.safetensors import Header, TensorInfo, encode_header, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PAGE = 4096
HASHED = 2 * PIECE
"""Bytes hashed at a time, at most, while as many are read: handing over less keeps threads waiting for each other."""
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


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """Bytes ``[start, stop)`` of a file, and what :func:`page_checksum` says of them."""

    start: int
    stop: int
    checksum: int


class ShardWriter:
    """A shard under its temporary name. ``write`` and ``write_variable`` may be called from several threads."""

    def __init__(
        self,
        folder: Directory,
        layout: ShardLayout,
        descriptors: Descriptors,
        done: Callable[[WrittenFile], None],
    ) -> None:
        """Reserve the shard's space on disk, or raise IOFailed. ``done`` is called when it is complete and named."""
        self.layout, self._folder, self._disk = layout, folder, folder.disk
        self._name = layout.file + TEMPORARY
        self._temporary = folder.path / self._name
        self._descriptors = descriptors
        self._done = done
        self._tensors = {tensor.name: tensor for tensor in layout.tensors}
        self._chunks: list[Chunk] = []
        self._variable: dict[str, bytes] = {}
        self._finishing = False
        with descriptors.use(self._name, create=True) as descriptor:
            self._disk.reserve(descriptor, self._temporary, layout.size)

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
        with self._descriptors.use(self._name) as descriptor:
            chunk = write_chunk(self._disk, descriptor, self._temporary, view, start)
        self._chunks.append(chunk)  # atomic under the GIL and in free-threaded CPython

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
        with self._descriptors.use(self._name) as descriptor:
            self._disk.truncate(descriptor, self._temporary, size)
            # Reading back comes before fsync, because the kernel goes on storing meanwhile; both see the same pages.
            digest = read_back(self._disk, descriptor, self._temporary, sorted(self._chunks))
            self._require_header(descriptor, tensors, size)
            self._disk.sync(descriptor, self._temporary)
        self._descriptors.close(self._name)
        self._folder.rename(self._name, self.layout.file)
        self._folder.sync(self.layout.file.rpartition("/")[0])
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
                tensor = tensor._replace(shape=(length,), start=position, stop=position + length)
                position += length
            tensors.append(tensor)
        return tensors

    def _require_header(self, descriptor: int, tensors: list[TensorInfo], size: int) -> None:
        found = _header(self._disk, descriptor, self._temporary, size)
        if found.data_start != self.layout.header_size or found.tensors != {tensor.name: tensor for tensor in tensors}:
            raise RuntimeError(f"{self.layout.file}: its header does not read as planned")


def _header(disk: Disk, descriptor: int, path: Path, size: int) -> Header:
    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: disk.read(descriptor, path, memoryview(buffer), offset)])

    return read_header(read, size, str(path))


def has_layout(folder: Directory, layout: ShardLayout) -> bool:
    """Whether the header of a finished shard is the one that the layout leads to."""
    path, disk = folder.path / layout.file, folder.disk
    descriptor = folder.open(layout.file)
    try:
        found = _header(disk, descriptor, path, disk.size(descriptor, path))
    except MalformedInput:
        return False
    finally:
        disk.close(descriptor, path)
    if found.data_start != layout.header_size or found.tensors.keys() != {tensor.name for tensor in layout.tensors}:
        return False
    for planned in layout.tensors:
        tensor = found.tensors[planned.name]
        if planned.name not in layout.variable:
            if tensor != planned:
                return False
        elif (tensor.dtype, len(tensor.shape)) != ("U8", 1) or tensor.nbytes > planned.nbytes:
            return False
    return True


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
