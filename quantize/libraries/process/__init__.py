"""A process of its own in which a library builds a class, so that the one that streams need not import it."""

from __future__ import annotations

from collections.abc import Callable

_meanwhile: list[Callable[[], object]] = []


def meanwhile(work: Callable[[], object]) -> None:
    """Name what can be done here while the other process is at work; it is done once, if there is one."""
    _meanwhile.append(work)


def do_meanwhile() -> None:
    """Do what ``meanwhile`` was given."""
    while _meanwhile:
        _meanwhile.pop()()
