"""A file as it was when it was verified: opened without following links, and only as long as it is the same."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from qz import MalformedInput, OutputRefused

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A regular file by its identity, to be taken before it is verified. ``path``: as the user knows it."""

    path: Path
    real: str
    identity: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> VerifiedFile:
        """The file at ``path``, where a link may lead: what may be read of a folder is for the folder to say."""
        real = os.path.realpath(path)
        try:
            return cls(path, real, _identity(os.lstat(real)))
        except OSError as error:
            raise MalformedInput(f"{path} cannot be read: {error.strerror}.") from None

    @property
    def size(self) -> int:
        return self.identity[2]

    def open(self) -> int:
        """A descriptor for reading, to be closed by the caller; OutputRefused if it is not the same file any more."""
        try:
            descriptor = os.open(self.real, _FLAGS)
        except OSError:
            raise self._changed() from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or _identity(found) != self.identity:
            os.close(descriptor)
            raise self._changed()
        return descriptor

    def read(self, limit: int | None = None) -> bytes:
        """All of it, if it is the same before and after; MalformedInput if it is longer than ``limit`` bytes."""
        if limit is not None and self.size > limit:
            raise MalformedInput(f"{self.path} is longer than {limit:,} bytes, too large for such a file.")
        with open(self.open(), "rb") as file:
            data = file.read(self.size + 1)
            if _identity(os.fstat(file.fileno())) != self.identity or len(data) != self.size:
                raise self._changed()
        return data

    def head(self, count: int) -> bytes:
        """Its first ``count`` bytes, or all where there are fewer."""
        with open(self.open(), "rb") as file:
            return file.read(count)

    def hashed(self) -> str:
        """The SHA-256 of what it holds, in hexadecimal."""
        with open(self.open(), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def require_same(self) -> None:
        """Raise OutputRefused if anything about it changed since."""
        os.close(self.open())

    def _changed(self) -> OutputRefused:
        return OutputRefused(f"{self.path} changed during the push. Nothing was committed; push again.")


def _identity(found: os.stat_result) -> tuple[int, ...]:
    """The kernel sets the time of the last change of status itself: nobody can set it back, as that of the content."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
