"""Where everything lies in a shard, before a byte of it is written, and whether a finished one is as planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qz import MalformedInput
from qz.formats.tensors.safetensors import Header, TensorInfo, read_header

if TYPE_CHECKING:
    from pathlib import Path

    from qz.formats.output.storage.directory import Directory
    from qz.formats.output.storage.disk import Disk

TEMPORARY = ".tmp"
"""What a file's name ends with while it is written."""


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


def header_of(disk: Disk, descriptor: int, path: Path, size: int) -> Header:
    """The header of an open shard; MalformedInput if it is none."""

    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: disk.read(descriptor, path, memoryview(buffer), offset)])

    return read_header(read, size, str(path))


def has_layout(folder: Directory, layout: ShardLayout) -> bool:
    """Whether the header of a finished shard is the one that the layout leads to."""
    path, disk = folder.path / layout.file, folder.disk
    descriptor = folder.open(layout.file)
    try:
        found = header_of(disk, descriptor, path, disk.size(descriptor, path))
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
