"""Where a checkpoint's files lie: a local folder here, a Hub repository in ``hub.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``[start, stop)`` of one file."""

    file: str
    start: int
    stop: int


class Folder(Protocol):
    """Files to read by offset. Thread-safe. Names are plain file names inside this folder."""

    location: str
    """How to show it to the user: a path, or ``repo_id@commit``."""

    def sizes(self) -> Mapping[str, int]:
        """Every regular file's name and size in bytes."""
        ...

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``, or raise MissingInput, MalformedInput (short file) or IOFailed."""
        ...

    def announce(self, ranges: Sequence[Range]) -> None:
        """Tell, once, every range that will be read and in which order, so that it can be fetched ahead."""
        ...

    def check(self) -> None:
        """After the last read: raise MalformedInput if a file changed meanwhile or its hash is not the promised one."""
        ...

    def identity(self) -> dict[str, Any]:
        """What makes this input the same input: commit, or inode, size and mtime of every file (JSON values)."""
        ...

    def subfolder(self, name: str) -> Folder:
        """The folder of one component; MissingInput, naming those there are, if it does not exist."""
        ...

    def subfolders(self) -> Sequence[str]:
        """Names of the folders inside."""
        ...

    def close(self) -> None: ...
