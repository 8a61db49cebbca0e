"""Numbers with their nouns, for messages and reports."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """``1 tensor``, ``2,000 tensors``: ``noun`` is the singular of a noun that only takes an s."""
    return f"{number:,} {plural(noun, number)}"


def plural(noun: str, number: int) -> str:
    """``noun`` in the form that ``number`` asks for."""
    return noun if number == 1 else f"{noun}s"
