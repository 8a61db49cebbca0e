"""Tensor bytes as numpy arrays, and the reusable memory that holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Memory = Callable[[str, int], Bytes]
"""A thread's reusable memory: a use and a length in bytes in, that memory out; valid until the use's next call."""


def ordinary_memory(nbytes: int) -> Bytes:
    """Uninitialized memory, uint8[nbytes]."""
    return np.empty(nbytes, np.uint8)


class Buffers:
    """One thread's reusable memory, by use: ``get`` is a ``Memory``. ``buffer`` makes what is not there yet."""

    def __init__(self, buffer: Callable[[int], Bytes] = ordinary_memory) -> None:
        self._buffer = buffer
        self._held: dict[str, Bytes] = {}

    def get(self, use: str, nbytes: int) -> Bytes:
        held = self._held.get(use)
        if held is None or held.nbytes < nbytes:
            held = self._held[use] = self._buffer(nbytes)
        return held[:nbytes]


NUMPY = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
"""How kernels see values: fp32, or the bits of the 16-bit floats."""


def values(raw: Bytes, dtype: str) -> NDArray[Any]:
    """Bytes as the kernels' values; other dtypes (float64, integers) stay as bytes."""
    return raw.view(NUMPY[dtype]) if dtype in NUMPY else raw


_EXPONENT = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}


def count_nonfinite(array: NDArray[Any], dtype: str, memory: Memory) -> int:
    """How many of a kernel's values are NaN or infinite; 0 for dtypes that have none. ``memory``: for as many bytes."""
    if dtype not in NUMPY or not array.size:
        return 0
    if dtype == "F32":
        found = memory("finite", array.size).view(np.bool_)
        np.isfinite(array, out=found)
        return array.size - int(np.count_nonzero(found))
    exponents = memory("finite", array.nbytes).view(np.uint16)
    np.bitwise_and(array, _EXPONENT[dtype], out=exponents)
    if exponents.max() < _EXPONENT[dtype]:  # saves a pass in nearly all cases
        return 0
    return int(np.count_nonzero(exponents == _EXPONENT[dtype]))
