"""A file that the Hub lists, and the hash that its content must have."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qz.formats.malformed import Malformed

if TYPE_CHECKING:
    from qz.formats.hub.read_ahead import Hasher


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a commit. ``path`` is within the repository; ``sha256`` is its LFS oid, ``git`` its blob's SHA-1,
    ``xet`` its Xet hash, by which the storage behind the Hub knows it."""

    path: str
    size: int
    git: str
    sha256: str | None
    xet: str | None = None
    depth: int = 0
    """Folders inside the one that it counts for, in which it lies."""

    @property
    def name(self) -> str:
        """Its name inside its folder."""
        return "/".join(self.path.split("/")[-1 - self.depth :])

    @property
    def place(self) -> tuple[str, list[str]]:
        """As ``Folder.include`` takes it."""
        folder, _, base = self.name.rpartition("/")
        return folder, [base]

    @property
    def digest(self) -> str:
        """The promised hash of the content, hexadecimal: SHA-256 for LFS files, git's SHA-1 for others."""
        return self.sha256 or self.git

    def hasher(self) -> Hasher:
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


def differs(where: str, digest: str) -> Malformed:
    """The error for content with another hash than the Hub lists."""
    return Malformed(
        "changed",
        f"{where} does not match the hash listed by the Hub ({digest}); the data was discarded. Run the same command "
        "again.",
    )


def not_as_listed(where: str, sent: str) -> Malformed:
    """The error for an answer about another file than the one listed."""
    return Malformed(
        "changed",
        f"{where} is not what the Hub lists: the server sent {sent}. Run the same command again; if this persists, ask "
        "the repository's owner.",
    )
