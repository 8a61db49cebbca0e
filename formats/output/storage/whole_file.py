"""One file that is complete or absent, and no part of an output in the making."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk

REMAINS_DIGITS = 8
"""Part of a file's name until it is whole, so that it cannot be anyone else's file."""


def write_whole(path: Path, pieces: Iterable[memoryview]) -> str:
    """Write ``pieces`` of bytes one after the other, and replace what is at ``path`` at once; their SHA-256.

    Raises what ``Disk`` raises.
    """
    digest, position = hashlib.sha256(), 0
    disk, partial = Disk(), path.with_name(f"{path.name}.{secrets.token_hex(REMAINS_DIGITS // 2)}.partial")
    with Directory.at(disk, path.parent) as folder:
        descriptor = folder.create(partial.name)
        try:
            for piece in pieces:
                disk.write(descriptor, partial, piece, position)
                digest.update(piece)
                position += len(piece)
            disk.sync(descriptor, partial)
            folder.rename(partial.name, path.name)
        except BaseException:
            folder.discard(partial.name, descriptor)
            raise
        finally:
            disk.close(descriptor, partial)
        folder.sync()
    return digest.hexdigest()


def remove_remains(path: Path) -> None:
    """Remove what processes that were killed while they wrote the file at ``path`` left of it."""
    own = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{{REMAINS_DIGITS}}}\.partial")
    for entry in os.scandir(path.parent):
        if own.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
