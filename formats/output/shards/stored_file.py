"""One file that is no shard, written from beginning to end: under a temporary name, read back, durable, then named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.output.recorded.record import WrittenFile
from qz.formats.output.shards.checksums import Chunk, read_back, write_chunk
from qz.formats.output.shards.shard_layout import TEMPORARY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qz.formats.output.storage.directory import Directory


def store_file(folder: Directory, name: str, pieces: Iterable[memoryview], reserve: int = 0) -> WrittenFile:
    """Write ``pieces`` one after the other into a new file. ``reserve``: its bytes, to be sure of their space first."""
    disk, temporary = folder.disk, folder.path / (name + TEMPORARY)
    folder.make_parents(name)
    chunks: list[Chunk] = []
    size = 0
    descriptor = folder.create(name + TEMPORARY)
    try:
        if reserve:
            disk.reserve(descriptor, temporary, reserve)
        for piece in pieces:
            chunks.append(write_chunk(disk, descriptor, temporary, piece, size))
            size += len(piece)
        written = WrittenFile(name, size, read_back(disk, descriptor, temporary, chunks))
        disk.sync(descriptor, temporary)
    finally:
        disk.close(descriptor, temporary)
    folder.rename(name + TEMPORARY, name)
    folder.sync(name.rpartition("/")[0])
    return written
