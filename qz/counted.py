"""Numbers with their nouns, and a few of many names, for messages and reports."""

from __future__ import annotations

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """``1 tensor``, ``2,000 tensors``: ``noun`` is the singular of a noun that only takes an s."""
    return f"{number:,} {plural(noun, number)}"


def shown(names: Iterable[str], most: int = 3) -> str:
    """A few of many names: ``a, b, c and 2,000 more``."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def plural(noun: str, number: int) -> str:
    """``noun`` in the form that ``number`` asks for."""
    return noun if number == 1 else f"{noun}s"
