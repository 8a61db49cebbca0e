"""What is left of a file that is elsewhere by now: a sparse one of its size, with the header and the small tensors.

Whoever looks at a checkpoint without reading its weights still can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.files.folder import PIECE
from qz.formats.output.shards.shard_layout import TEMPORARY
from qz.formats.tensors.safetensors import read_header

if TYPE_CHECKING:
    from qz.formats.output.storage.directory import Directory

SMALL = 1024
"""Bytes of a tensor that is left: quant states and maps."""


def make_sparse(folder: Directory, name: str) -> None:
    """Replace the file by what is left of it, a sparse file, at once."""
    disk, path, temporary = folder.disk, folder.path / name, folder.path / (name + TEMPORARY)
    old, new = folder.open(name), None
    try:
        new = folder.create(name + TEMPORARY)
        size = disk.size(old, path)
        disk.truncate(new, temporary, size)

        def read(offset: int, length: int) -> bytes:
            data = bytearray(length)
            return bytes(data[: disk.read(old, path, memoryview(data), offset)])

        if path.name.endswith(".safetensors"):
            header = read_header(read, size, str(path))
            for start in range(0, header.data_start, PIECE):
                disk.write(new, temporary, memoryview(read(start, min(PIECE, header.data_start - start))), start)
            for tensor in header.tensors.values():
                if tensor.nbytes <= SMALL:
                    start = header.data_start + tensor.start
                    disk.write(new, temporary, memoryview(read(start, tensor.nbytes)), start)
    finally:
        disk.close(old, path)
        if new is not None:
            disk.close(new, temporary)
    folder.rename(name + TEMPORARY, name)
