"""A file of a commit: its place in the repository, its content on disk or in memory, and the names Git has for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

    from qz.formats.publish.verified_file import VerifiedFile

LARGEST_REGULAR = 10_000_000
"""Bytes of a file that Git itself may hold, and that is sent within a commit: the Hub takes none larger so."""
SAMPLE = 512
"""Bytes of a file that the Hub is shown to choose between Git and LFS."""


@dataclass(slots=True)
class Blob:
    """A file of the commit. ``content`` is None where the file is no longer on this disk: the Hub has it.

    ``sha256`` (hexadecimal) is None until it is known, which for a file on disk may be after its upload.
    """

    path: str
    size: int
    content: VerifiedFile | bytes | None
    sha256: str | None = None
    lfs: bool | None = None
    """Whether the commit names it by its SHA-256; None until the Hub was asked."""

    @classmethod
    def in_memory(cls, path: str, data: bytes) -> Blob:
        return cls(path, len(data), data, hashlib.sha256(data).hexdigest())

    def read(self) -> bytes:
        if self.content is None:
            raise RuntimeError(f"{self.path} is not on this disk")
        return self.content if isinstance(self.content, bytes) else self.content.read()

    def sample(self) -> bytes:
        """Its first bytes; what every safetensors file has where the file is gone."""
        if self.content is None:
            return b"\0" * min(SAMPLE, self.size)
        if isinstance(self.content, bytes):
            return self.content[:SAMPLE]
        with open(self.content.open(), "rb") as file:
            return file.read(SAMPLE)

    def is_at(self, entry: RepoFile) -> bool:
        """Whether what the Hub lists is this content."""
        if entry.size != self.size:
            return False
        if entry.lfs:
            return entry.lfs.sha256 == self.hashed()
        is_small = self.size <= LARGEST_REGULAR
        return is_small and self.content is not None and entry.blob_id == git_hash(self.read())

    def hashed(self) -> str:
        """Its SHA-256; the file is read for it once."""
        if self.sha256 is None:
            if isinstance(self.content, bytes) or self.content is None:
                self.sha256 = hashlib.sha256(self.read()).hexdigest()
            else:
                self.sha256 = self.content.hashed()
        return self.sha256


def git_hash(data: bytes) -> str:
    """The SHA-1 under which Git keeps a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
