"""One kind of error for each way a file can be wrong, and text from a file made fit to be shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qz import MalformedInput

# C0, DEL, C1, bidirectional marks, line separators, the byte order mark, and halves of surrogate pairs.
UNSAFE_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

GIT_LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git has in the place of one that Git LFS did not fetch."""


class Malformed(MalformedInput):
    """A file that breaks the rules; ``kind`` (kebab-case) says which, for those who list problems."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def quoted_names(names: Sequence[str], most: int = 4) -> str:
    """The first of many names from a file, each in quotes and cut; an ellipsis says that there are others."""
    return ", ".join(quoted(name, 60) for name in names[:most]) + (" …" if len(names) > most else "")


def quoted(text: str, width: int = 80) -> str:
    """``text`` in quotes, cut to ``width``, with everything unprintable escaped."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")
