"""How far work is, as every part of qz tells it and every display shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of work under way.

    ``doing`` says what, in a word or two: ``Quantizing``. ``done`` of ``total`` things are finished, which ``unit``
    names in the singular; ``bytes`` of ``all_bytes`` are. Totals are 0 while they are not known. ``file`` is one that
    was just completed. ``kept``: how many files an earlier, interrupted run had completed, and of how many (0 if
    nobody knows); told once, at the beginning. ``kept_bytes``: what it had done of others.
    """

    doing: str
    done: int = 0
    total: int = 0
    bytes: int = 0
    all_bytes: int = 0
    unit: str = "tensor"
    file: str | None = None
    kept: tuple[int, int] | None = None
    kept_bytes: int = 0


OnProgress = Callable[[Progress], None]
"""Called from any thread, many times a second."""


def ignore(_: object) -> None:
    """For those who want to know nothing of the progress."""
