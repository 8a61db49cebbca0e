"""A file by its path, which may turn out to be a FIFO, a device, or far too large."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


class NotRegular(OSError):
    """Raised for what is there and is no regular file; ``strerror`` says what it is."""


class TooLarge(OSError):
    """Raised for a file beyond the limit."""


def open_regular(path: Path) -> BufferedReader:
    """Open to read. Raises NotRegular, FileNotFoundError also where no such path can be, and OSError; never waits."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        if error.errno == errno.ELOOP:
            raise NotRegular(errno.ELOOP, "a link that leads back to itself", str(path)) from None
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise NotRegular(error.errno, "a socket or a device", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder", str(path))
    raise NotRegular(errno.ENXIO, "a FIFO or a device", str(path))


def read_regular(path: Path, limit: int) -> bytes:
    """All of a file of at most ``limit`` bytes. Raises TooLarge, and as ``open_regular``."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if data is None:  # some kernel files would block
        raise NotRegular(errno.EAGAIN, "a file that has nothing to read yet", str(path))
    if len(data) > limit:
        raise TooLarge(errno.EFBIG, "too large", str(path))
    return data
