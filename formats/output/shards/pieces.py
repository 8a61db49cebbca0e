"""What is finished of a shard that is not: stored, noted in the journal, and compared before a later run builds on it.

A piece is a number of tensors. It has the checksums of its chunks with which the whole shard is read back in the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qz.formats.output.recorded.record import require_safe_name
from qz.formats.output.shards.checksums import Chunk, is_as_written
from qz.formats.output.shards.shard_layout import TEMPORARY, ShardLayout
from qz.formats.tensors.safetensors_layout import encode_header

if TYPE_CHECKING:
    from qz.formats.output.storage.directory import Directory
    from qz.formats.tensors.safetensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors of the shard ``name``: the chunks they were written in, and the bytes of those of variable length."""

    name: str
    layout: str
    """See ``layout_digest``."""
    chunks: tuple[Chunk, ...]
    variable: Mapping[str, bytes]

    def as_entry(self) -> dict[str, Any]:
        """What the journal holds of it."""
        chunks = [[chunk.start, chunk.stop, chunk.checksum] for chunk in self.chunks]
        variable = {name: data.hex() for name, data in self.variable.items()}
        return {"name": self.name, "layout": self.layout, "chunks": chunks, "variable": variable}


def is_piece(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a journal is a piece, not a finished file."""
    return "chunks" in entry


def as_piece(entry: Mapping[str, Any]) -> Piece:
    """A piece from its entry; ValueError, TypeError, LookupError or AttributeError if it is not one."""
    chunks = tuple(Chunk(start, stop, checksum) for start, stop, checksum in entry["chunks"])
    numbers = [number for chunk in chunks for number in (chunk.start, chunk.stop, chunk.checksum)]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise TypeError("an entry is not a piece")
    variable = {name: bytes.fromhex(data) for name, data in entry["variable"].items()}
    require_safe_name(entry["name"])
    return Piece(entry["name"], str(entry["layout"]), chunks, variable)


@dataclass(frozen=True, slots=True)
class Begun:
    """What is kept of a shard that an earlier run began: whole tensors."""

    tensors: frozenset[str]
    chunks: tuple[Chunk, ...]
    variable: Mapping[str, bytes]

    @property
    def bytes(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


def layout_digest(layout: ShardLayout) -> str:
    """A SHA-256 that two layouts share only if every tensor lies at the same place in both."""
    text = encode_header(layout.tensors, reserve=layout.header_size) + "\0".join(sorted(layout.variable)).encode()
    return hashlib.sha256(text).hexdigest()


def begun_shard(folder: Directory, layout: ShardLayout, pieces: Iterable[Piece]) -> Begun | None:
    """What of ``pieces`` is in the folder as it was written; None if nothing is.

    Reads all of it. A tensor of which a chunk is damaged does not count, nor a piece of another layout.
    """
    digest = layout_digest(layout)
    pieces = [piece for piece in pieces if piece.layout == digest]
    if not pieces:
        return None
    variable = {name: data for piece in pieces for name, data in piece.variable.items()}
    lengths = {tensor.name: tensor.nbytes for tensor in layout.tensors if tensor.name in layout.variable}
    variable = {name: data for name, data in variable.items() if len(data) <= lengths.get(name, -1)}
    chunks_of = {tensor: chunks for piece in pieces for tensor, chunks in by_tensor(layout, piece.chunks)}
    path, disk = folder.path / (layout.file + TEMPORARY), folder.disk
    descriptor = folder.open(layout.file + TEMPORARY)
    try:
        sound = {
            tensor: chunks
            for tensor, chunks in chunks_of.items()
            if all(is_as_written(disk, descriptor, path, chunk) for chunk in chunks)
        }
    finally:
        disk.close(descriptor, path)
    if not sound:
        return None
    empty = {tensor.name for tensor in layout.tensors if tensor.nbytes == 0}
    every = tuple(chunk for chunks in sound.values() for chunk in chunks)
    return Begun(frozenset(sound.keys() | variable.keys() | empty), every, variable)


def by_tensor(layout: ShardLayout, chunks: Iterable[Chunk]) -> Iterator[tuple[str, Sequence[Chunk]]]:
    """Each tensor of fixed length that ``chunks`` cover exactly, with those that do."""
    left = sorted(chunks, reverse=True)
    for tensor in sorted(_fixed(layout), key=lambda tensor: tensor.start):
        start, stop = layout.header_size + tensor.start, layout.header_size + tensor.stop
        while left and left[-1].start < start:
            left.pop()
        found: list[Chunk] = []
        while left and left[-1].start == start and left[-1].stop <= stop:
            found.append(left.pop())
            start = found[-1].stop
        if start == stop:
            yield tensor.name, found


def _fixed(layout: ShardLayout) -> Iterator[TensorInfo]:
    return (tensor for tensor in layout.tensors if tensor.nbytes and tensor.name not in layout.variable)
