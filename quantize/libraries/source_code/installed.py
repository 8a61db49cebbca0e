"""The files of an installed package: found and read, and nothing of it imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def folder_of(package: str) -> Path:
    """Where it lies; the working directory's ``Path()`` if it is not installed."""
    found = find_spec(package)
    return Path(found.origin).parent if found and found.origin else Path()


def text_of(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
