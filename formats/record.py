"""``qz.json``, the one file qz adds to a checkpoint: every other file's size and SHA-256, to check it again later.

Loaders take files by name and never look at this one. It holds names, sizes and hashes, and what the caller says about
the making of the checkpoint; no path, host or user name of the machine that made it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RECORD = "qz.json"


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file as it was written: its name relative to the output, its size, and its SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


def encode_record(files: Iterable[WrittenFile], about: Mapping[str, Any]) -> bytes:
    """The record's JSON; the same bytes for the same checkpoint, whatever the order of ``files``."""
    listed = [asdict(file) for file in sorted(files, key=lambda file: file.name)]
    return (json.dumps({"version": 1, **about, "files": listed}, indent=2) + "\n").encode()
