"""Tensor bytes as numpy arrays, and the reusable memory that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Memory = Callable[[str, int], Bytes]
"""A thread's reusable memory: a use and a length in bytes in, that memory out; valid until the use's next call."""

NUMPY = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
"""How kernels see values: fp32, or the bits of the 16-bit floats."""


def values(raw: Bytes, dtype: str) -> NDArray[Any]:
    """Bytes as the kernels' values; other dtypes (float64, integers) stay as bytes."""
    return raw.view(NUMPY[dtype]) if dtype in NUMPY else raw


def elements(shape: Iterable[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
