"""A limit on how many threads do something at once, which an interrupt cannot leave locked."""

from __future__ import annotations

from queue import SimpleQueue


class Slots:
    """As a ``threading.Semaphore`` is used: ``with slots:`` waits until one is free.

    Semaphores are Python code: an interrupt in the middle of one can leave its lock taken for ever. A ``SimpleQueue``
    is C, and gives or takes a slot as one step. See ``qz.formats.output.storage.signals``.
    """

    def __init__(self, count: int) -> None:
        self._free = SimpleQueue[None]()
        for _ in range(count):
            self.release()

    def acquire(self) -> None:
        """Take a slot, waiting for one if none is free."""
        self._free.get()

    def release(self) -> None:
        """Give a slot back, from whichever thread."""
        self._free.put(None)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
