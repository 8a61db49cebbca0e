"""Limits on CPU time that mean the same on every machine, under any load: multiples of a calibration loop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

HANG = 600
"""Seconds after which a process hangs for certain. A guard, not a limit: nothing here takes a tenth of it."""


def calibration_loop() -> float:
    """CPU seconds of a fixed piece of work like that of reading headers: 0.06 on a CPU of 2023."""
    start = time.process_time()
    text = json.dumps({f"model.layers.{number}.weight": [number, number + 1] for number in range(40_000)})
    assert len(json.loads(text)) == 40_000
    return time.process_time() - start


@cache
def _lately(half_minute: int) -> float:
    return calibration_loop()


@dataclass
class Watch:
    seconds: float = float("nan")

    @property
    def loops(self) -> float:
        """CPU time of this process in the body, in calibration loops of the same half minute."""
        return self.seconds / _lately(int(time.monotonic() / 30))


@contextmanager
def stopwatch() -> Iterator[Watch]:
    watch, start = Watch(), time.process_time()
    try:
        yield watch
    finally:
        watch.seconds = time.process_time() - start
