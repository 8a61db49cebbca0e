"""A tensor whose values are those of others, one after the other, each of which is stored in a form of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qz.quantize.compute.arrays import Bytes, Memory
    from qz.quantize.decoding.open import Reader


class PiecesReader:
    """What none of them can part; a read touches those that it lies in."""

    def __init__(self, readers: Sequence[Reader], counts: Sequence[int]) -> None:
        self.readers, self.counts = readers, counts
        self.unit = math.lcm(*(reader.unit for reader in readers))

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        found: list[Bytes] = []
        begins, dtype = 0, ""
        for reader, count in zip(self.readers, self.counts, strict=True):
            low, high = max(start, begins), min(stop, begins + count)
            if low < high:
                raw, dtype = reader.read(low - begins, high - begins, target, memory)
                if high - low == stop - start:
                    return raw, dtype
                found.append(raw.copy())  # the buffer is reused
            begins += count
        return np.concatenate(found), dtype
