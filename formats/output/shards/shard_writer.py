"""One shard being written: by offset, from several threads, read back and compared before it gets its name."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from qz.formats.output.recorded.record import WrittenFile
from qz.formats.output.shards.checksums import Chunk, as_bytes, read_back, write_chunk
from qz.formats.output.shards.pieces import Begun, Piece, by_tensor, layout_digest
from qz.formats.output.shards.shard_layout import TEMPORARY, ShardLayout, header_of
from qz.formats.output.storage.descriptors import Descriptors
from qz.formats.output.storage.directory import Directory
from qz.formats.tensors.safetensors import TensorInfo
from qz.formats.tensors.safetensors_layout import encode_header

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


class ShardWriter:
    """A shard under its temporary name. All but ``finish`` may be called from several threads at the same time."""

    def __init__(
        self,
        folder: Directory,
        layout: ShardLayout,
        descriptors: Descriptors,
        done: Callable[[WrittenFile], None],
        begun: Begun | None = None,
    ) -> None:
        """Reserve the shard's space on disk, or raise IOFailed. ``done`` is called when it is complete and named.

        ``begun``: what an earlier run has written of it, which lies there under the temporary name.
        """
        self.layout, self._folder, self._disk = layout, folder, folder.disk
        self._name = layout.file + TEMPORARY
        self._temporary = folder.path / self._name
        self._descriptors = descriptors
        self._done = done
        self._tensors = {tensor.name: tensor for tensor in layout.tensors}
        self._chunks: list[Chunk] = list(begun.chunks) if begun else []
        self._variable: dict[str, bytes] = dict(begun.variable) if begun else {}
        self._finishing = self._is_named = False
        self._storing = threading.Lock()
        with descriptors.use(self._name, create=begun is None) as descriptor:
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

    def store(self, tensors: Collection[str]) -> Piece | None:
        """Have these tensors, which are whole, stored durably: what to note of them. None if it is being finished."""
        with self._storing:
            if self._finishing:
                return None
            wanted, whole = set(tensors), by_tensor(self.layout, self._chunks)
            chunks = [chunk for name, found in whole if name in wanted for chunk in found]
            with self._descriptors.use(self._name) as descriptor:
                self._disk.sync(descriptor, self._temporary)
            if not self._is_named:
                self._folder.sync(self._name.rpartition("/")[0])
                self._is_named = True
            variable = {name: self._variable[name] for name in sorted(wanted & self.layout.variable)}
            return Piece(self.layout.file, layout_digest(self.layout), tuple(chunks), variable)

    def finish(self) -> WrittenFile:
        """Write the header, store the file durably, compare what can be read with what was written, and name it.

        Raises RuntimeError if a tensor was not written whole, IOFailed if the file reads back different.
        """
        with self._storing:
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
        found = header_of(self._disk, descriptor, self._temporary, size)
        if found.data_start != self.layout.header_size or found.tensors != {tensor.name: tensor for tensor in tensors}:
            raise RuntimeError(f"{self.layout.file}: its header does not read as planned")
