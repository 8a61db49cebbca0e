"""Small reads from a folder that is far away, several at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from qz.formats.files.local_folder import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qz.formats.files.folder import Folder

T = TypeVar("T")
R = TypeVar("R")
THREADS = 8


def several_at_once(folder: Folder, read: Callable[[T], R], things: Sequence[T]) -> list[R]:
    """``read`` of each, in order; several at a time where most of the time is spent waiting for the Hub."""
    if len(things) < 2 or isinstance(folder, LocalFolder):
        return [read(each) for each in things]
    from qz.thread_pool import thread_pool

    with thread_pool(THREADS) as pool:
        return list(pool.map(read, things))
