"""The contents of many small tensors: neighbours are read together, and several at a time where they are far away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.checkpoint.concurrent_reads import several_at_once
from qz.formats.files.folder import Folder, Range

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qz.formats.tensors.decoded import StoredTensor

_GAP = 16_384
_READ = 1 << 20


def read_small(folder: Folder, tensors: Iterable[StoredTensor], most: int | None = None) -> dict[str, bytes]:
    """The bytes of ``tensors`` by name, or of the first ``most`` of them."""
    wanted = sorted(tensors, key=lambda part: (part.file, part.offset))[:most]
    reads: list[tuple[Range, list[StoredTensor]]] = []
    for part in wanted:
        stop = part.offset + part.nbytes
        last = reads[-1][0] if reads else None
        if last and last.file == part.file and part.offset - last.stop <= _GAP and stop - last.start <= _READ:
            reads[-1] = (Range(part.file, last.start, stop), reads[-1][1])
            reads[-1][1].append(part)
        else:
            reads.append((Range(part.file, part.offset, stop), [part]))

    def fetch(place: Range) -> bytes:
        buffer = bytearray(place.stop - place.start)
        folder.read_into(place.file, place.start, memoryview(buffer))
        return bytes(buffer)

    places = [place for place, _ in reads]
    blocks = several_at_once(folder, fetch, places)
    return {
        part.name: block[part.offset - place.start : part.offset - place.start + part.nbytes]
        for (place, parts), block in zip(reads, blocks, strict=True)
        for part in parts
    }
