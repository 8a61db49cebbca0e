"""Values that get their codes last: under double quantization a searched scale is known only with all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from qz.quantize.streaming.measuring.observer import Values


@dataclass(frozen=True, slots=True)
class Deferred:
    """Values of a weight from ``start`` on, in its dtype; ``original``: as they were before the cast, if asked for."""

    start: int
    values: NDArray[Any]
    original: Values | None


def deferred(start: int, values: Values, original: Values, *, observed: bool) -> Deferred:
    """A copy of values whose memory is used again."""
    kept = values[0].copy()
    if not observed:
        return Deferred(start, kept, None)
    return Deferred(start, kept, (kept if original[1] == values[1] else original[0].copy(), original[1]))
