"""One file that is complete or absent, and no part of an output in the making."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk


def write_whole(path: Path, pieces: Iterable[memoryview]) -> str:
    """Write ``pieces`` of bytes one after the other, and replace what is at ``path`` at once; their SHA-256.

    Raises what ``Disk`` raises.
    """
    digest, position = hashlib.sha256(), 0
    disk, partial = Disk(), path.with_name(f"{path.name}.partial")
    with Directory.at(disk, path.parent) as folder:
        descriptor = folder.open_or_create(partial.name)
        try:
            disk.truncate(descriptor, partial, 0)
            for piece in pieces:
                disk.write(descriptor, partial, piece, position)
                digest.update(piece)
                position += len(piece)
            disk.sync(descriptor, partial)
        finally:
            disk.close(descriptor, partial)
        folder.rename(partial.name, path.name)
        folder.sync()
    return digest.hexdigest()
