"""ggml's most common blocks as float32, in loops that numba compiles: the bits of ``gguf.quants`` (0.19).

No product is fused with a sum, as numpy fuses none. Blocks come as rows of bytes, their float16 scales as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from qz.quantize.compute.cpu.jit import array, compiled, inlined

_Array = npt.NDArray[Any]
_ROWS, _SCALES, _OUT = array(types.uint8, 2), array(types.float32), array(types.float32, 2, output=True)


@inlined
def _float(value: Any) -> Any:
    return np.float32(np.int32(value))


@inlined
def _scale_of(row: Any, k: Any) -> Any:
    """The 6-bit scale of the sub-block ``k`` of eight, from bytes 4 to 15 of a K-quant."""
    low = row[4 + k] & 63 if k < 4 else (row[8 + k] & 15) | ((row[k] >> 2) & 48)
    return _float(low)


@inlined
def _least_of(row: Any, k: Any) -> Any:
    """Its 6-bit minimum."""
    low = row[8 + k] & 63 if k < 4 else (row[8 + k] >> 4) | ((row[4 + k] >> 2) & 48)
    return _float(low)


@compiled(types.void(_ROWS, _SCALES, _OUT))
def _q8_0(rows: Any, d: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        for j in range(32):
            out[i, j] = d[i] * np.float32(np.int8(rows[i, 2 + j]))


@compiled(types.void(_ROWS, _SCALES, _OUT))
def _q4_0(rows: Any, d: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        for j in range(16):
            code = np.int32(rows[i, 2 + j])
            out[i, j] = d[i] * np.float32((code & 15) - 8)
            out[i, 16 + j] = d[i] * np.float32((code >> 4) - 8)


@compiled(types.void(_ROWS, _SCALES, _SCALES, _OUT))
def _q4_k(rows: Any, d: Any, least: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        row = rows[i]
        for pair in range(4):
            low, low_least = d[i] * _scale_of(row, 2 * pair), least[i] * _least_of(row, 2 * pair)
            high, high_least = d[i] * _scale_of(row, 2 * pair + 1), least[i] * _least_of(row, 2 * pair + 1)
            for j in range(32):
                code = np.int32(row[16 + 32 * pair + j])
                out[i, 64 * pair + j] = low * np.float32(code & 15) - low_least
                out[i, 64 * pair + 32 + j] = high * np.float32(code >> 4) - high_least


@compiled(types.void(_ROWS, _SCALES, _SCALES, _OUT))
def _q5_k(rows: Any, d: Any, least: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        row = rows[i]
        for pair in range(4):
            low, low_least = d[i] * _scale_of(row, 2 * pair), least[i] * _least_of(row, 2 * pair)
            high, high_least = d[i] * _scale_of(row, 2 * pair + 1), least[i] * _least_of(row, 2 * pair + 1)
            for j in range(32):
                code, fifth = np.int32(row[48 + 32 * pair + j]), np.int32(row[16 + j]) >> (2 * pair)
                out[i, 64 * pair + j] = low * np.float32((code & 15) | ((fifth & 1) << 4)) - low_least
                out[i, 64 * pair + 32 + j] = high * np.float32((code >> 4) | ((fifth & 2) << 3)) - high_least


@compiled(types.void(_ROWS, _SCALES, _OUT))
def _q6_k(rows: Any, d: Any, out: Any) -> None:
    for i in range(rows.shape[0]):
        row = rows[i]
        for group in range(16):  # of 16 values, which share a scale
            half, place = group // 8, group % 8 // 2
            scale = d[i] * np.float32(np.int8(row[192 + group]))
            start = 16 * (group % 2)
            for j in range(16):
                code = np.int32(row[64 * half + 32 * (place % 2) + start + j]) >> (4 * (place // 2))
                upper = np.int32(row[128 + 32 * half + start + j]) >> (2 * place)
                out[i, 16 * group + j] = scale * np.float32(((code & 15) | ((upper & 3) << 4)) - 32)


_KERNELS: dict[str, tuple[Callable[..., None], tuple[int, ...]]] = {
    "Q4_0": (_q4_0, (0,)),
    "Q8_0": (_q8_0, (0,)),
    "Q4_K": (_q4_k, (0, 2)),
    "Q5_K": (_q5_k, (0, 2)),
    "Q6_K": (_q6_k, (208,)),
}
"""By ggml's name; with where in a block its float16 scales lie."""


def dequantize_blocks(kind: str, rows: _Array, out: _Array) -> bool:
    """``out``, float32 (blocks, values), = ``rows``, uint8 (blocks, bytes). False for a ``kind`` that is not here."""
    if kind not in _KERNELS:
        return False
    kernel, places = _KERNELS[kind]
    halves = (np.ascontiguousarray(rows[:, place : place + 2]).view(np.float16).reshape(-1) for place in places)
    kernel(rows, *(half.astype(np.float32) for half in halves), out)
    return True
