"""A file by its path, where whoever names it may name a FIFO, a device, or something far too large."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


class NotRegular(OSError):
    """Raised for what is there and is no regular file."""


class TooLarge(OSError):
    """Raised for a file beyond the limit."""


def open_regular(path: Path) -> BufferedReader:
    """Open to read. Raises NotRegular, and OSError as ``open`` does; never waits."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotRegular(errno.ENXIO, "not a regular file", str(path))


def read_regular(path: Path, limit: int) -> bytes:
    """All of a file of at most ``limit`` bytes. Raises TooLarge, and as ``open_regular``."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise TooLarge(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data
