"""Threads that work side by side until all are done; what one of them raises stops the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from qz.formats.output.storage.signals import defer_signals


class Workers:
    """Whatever works looks at ``stop`` between two pieces. ``begin`` may be called by one of the workers, too."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        """What was raised, in order."""
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._working = 0

    def begin(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run ``work`` in a thread of its own."""
        with defer_signals():  # so that every running thread is counted
            with self._lock:
                self._working += 1
            try:
                threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True).start()
            except BaseException:
                self._ended()
                raise

    def wait(self, on_error: Callable[[], None] = lambda: None) -> None:
        """Wait until no thread works; ``on_error`` is called once if one has failed, to release those that wait.

        ``Thread.join`` takes a thread for ended when an interrupt ends the waiting (3.11).
        """
        told = False
        while True:
            with self._lock:
                if self._working <= 0:
                    return
                if told or not self.errors:
                    self._idle.wait(0.2)
                if told or not self.errors:
                    continue
            told = True
            on_error()

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits, who raises it
            self.errors.append(error)
            self.stop.set()
            with self._lock:
                self._idle.notify_all()
        finally:
            self._ended()

    def _ended(self) -> None:
        with self._lock:
            self._working -= 1
            self._idle.notify_all()
