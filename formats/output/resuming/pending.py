"""What is finished, and enters the journal as soon as the source that it was made of is known to be right."""

from __future__ import annotations

import threading
from collections.abc import Callable

from qz.formats.output.recorded.record import WrittenFile
from qz.formats.output.resuming.journal import Journal
from qz.formats.output.shards.pieces import Piece

IsVerified = Callable[[], bool]
"""Whether the source is known to be right by now. It may raise what is known to be wrong."""


class Pending:
    """Files and pieces of shards that wait for their source. Thread-safe."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[tuple[WrittenFile | Piece, IsVerified]] = []
        self._settling = threading.Lock()

    def add(self, done: WrittenFile | Piece, is_verified: IsVerified) -> None:
        """Note it in the journal, now or later, and whatever can be noted by now."""
        self.settle((done, is_verified))

    def settle(self, *new: tuple[WrittenFile | Piece, IsVerified]) -> None:
        with self._settling:
            self._waiting += new
            for each in list(self._waiting):
                done, is_verified = each
                if not is_verified():
                    continue
                if isinstance(done, Piece):
                    self._journal.add_piece(done)
                else:
                    self._journal.add(done)
                self._waiting.remove(each)

    def waits(self, name: str) -> bool:
        """Whether the file of this name is finished and not noted."""
        with self._settling:
            return any(isinstance(done, WrittenFile) and done.name == name for done, _ in self._waiting)
