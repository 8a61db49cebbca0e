"""How long a failing request is repeated, and what all connections to one repository wait for together."""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass

from qz import HubUnreachable, QzError, TryAgain
from qz.counted import counted
from qz.formats.hub.transport.errors import Signal

log = logging.getLogger("qz.hub")
"""What a person at the terminal should know while nothing else moves: a long wait, a change to the other way."""

TOLD_FROM = 5.0
"""Waits of so many seconds are announced."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request is made that brings nothing new, and the seconds between, doubled each time."""

    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 8.0
    longest_asked: float = 300.0
    """The longest ``Retry-After`` or rest of a rate limit's window that is waited for."""

    def wait(self, failures: int) -> float:
        """Seconds before the next attempt, somewhat random so that connections do not come back together."""
        return min(self.longest_wait, self.first_wait * 2.0 ** (failures - 1)) * random.uniform(0.7, 1)  # noqa: S311


class Failed(Signal):
    """One attempt failed; another may not. ``wait``: seconds that the server asks for."""

    def __init__(self, reason: str, *, status: int = 0, wait: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.wait = status, wait


class Backoff:
    """Waits that end when the folder is closed. Thread-safe: what one connection is asked to wait, all of them do."""

    def __init__(self, location: str, retries: Retries | None = None) -> None:
        self.location, self.retries = location, retries or Retries()
        self._closing = threading.Event()
        self._not_before = self._told = 0.0
        self._lock = threading.Lock()

    def close(self) -> None:
        self._closing.set()

    def require_open(self) -> None:
        """Raise TryAgain once the folder is closed."""
        if self._closing.is_set():
            raise TryAgain(f"Reading {self.location} was stopped.")

    def until_allowed(self) -> None:
        """Wait as long as the server has asked any connection to."""
        left = self._not_before - time.monotonic()
        if left > 0:  # somewhat longer, so that connections do not come back together
            self._pause(left + random.uniform(0, min(1.0, left / 10)))  # noqa: S311
        self.require_open()

    def back_off(self, failed: Failed, failures: int, path: str) -> None:
        """Wait before the next attempt; raise ``used_up`` when there shall be none."""
        wait = failed.wait
        if failures >= self.retries.attempts or (wait or 0) > self.retries.longest_asked:
            raise self.used_up(failed, failures, path)
        if wait is None:
            self._pause(self.retries.wait(failures))
        elif wait > 0:
            self._defer(wait, failed)
        self.until_allowed()

    def used_up(self, failed: Failed, failures: int, path: str) -> QzError:
        asked = f" and asks to wait {failed.wait:.0f} s" if failed.wait else ""
        limited = failed.status == 429
        why = "the Hub limits the rate of requests" if limited else str(failed)
        attempts = counted(failures, "attempt")
        return (TryAgain if limited else HubUnreachable)(
            f"{self.location}/{path} could not be read after {attempts}: {why}{asked}. Run the same command again "
            "later."
        )

    def _defer(self, wait: float, failed: Failed) -> None:
        with self._lock:
            now = time.monotonic()
            self._not_before = max(self._not_before, now + wait)
            tell = wait >= TOLD_FROM and now >= self._told
            if tell:
                self._told = self._not_before
        if tell:
            log.warning("The Hub asks to wait (%s): reading %s goes on in %.0f s.", failed, self.location, wait)

    def _pause(self, seconds: float) -> None:
        if seconds > 0:
            self._closing.wait(seconds)
