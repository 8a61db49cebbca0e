"""A file that an option names for statistics: whether it can be one, and otherwise what it is."""

from __future__ import annotations

import os
from pathlib import Path

from qz import MissingInput
from qz.formats.files.regular_file import NotRegular, open_regular
from qz.formats.tensors.gguf_header import MAGIC
from qz.quantize.importance.statistics_file import malformed

HEAD = 512
"""Bytes that tell what a file is."""
WANTED = "what `qz calibrate` wrote, or an imatrix of llama.cpp (.gguf or .dat)"


def require_file_of_statistics(path: Path) -> None:
    """Raise MissingInput or Malformed, saying what is there instead, unless the file begins as one of statistics does.

    What is in it is for its reader to judge.
    """
    if (instead := _instead(path)) is not None:
        raise malformed(f"{path} is {instead}. Name a file: {WANTED}")


def _instead(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            head, size = file.read(HEAD), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise MissingInput(f"{path} does not exist. Name a file: {WANTED}.") from None
    except (IsADirectoryError, NotRegular) as error:
        return error.strerror
    except OSError:
        return None  # reported when it is read
    if not head:
        return "empty"
    if path.suffix == ".dat" or head.startswith(MAGIC) or head[8:9] == b"{":
        return None
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON"
    return "text" if _is_text(head, size) else "no safetensors file: it has no valid header"


def _is_text(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that begins so is text, of which ``head`` may cut a character in two."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= min(size, HEAD) - 4
    return b"\0" not in head
