"""Codes of a few bits and their values, in numpy: tables of the small floats, and how integers are unpacked."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the 4-bit float, by code; as ``FP4_VALUES`` of transformers 5.23."""
_PIECE = 1 << 16
"""Codes looked up at a time: their indices are eight bytes each."""


@cache
def table(dtype: str) -> Floats:
    """The 256 values of an 8-bit float, by code: ``F8_E4M3`` (without infinities), ``F8_E5M2`` or ``F8_E8M0``."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper byte of a float16
        return (codes << 8).view(np.float16).astype(np.float32)
    if dtype == "F8_E8M0":
        powers = np.ldexp(1.0, codes.astype(np.int32) - 127)
        powers[255] = np.nan
        return powers.astype(np.float32)
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    values = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    values[codes & 127 == 127] = np.nan
    return np.copysign(values, np.where(codes > 127, -1, 1)).astype(np.float32)


@cache
def pairs() -> NDArray[np.uint64]:
    """The two E2M1 values of a byte, low half first, as the eight bytes of two float32."""
    codes = np.arange(256)
    both = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=1)
    return np.ascontiguousarray(both).view(np.uint64).reshape(256)


def look_up(values: NDArray[Any], codes: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """``out`` = ``values[codes]``; all 1-D."""
    for start in range(0, codes.size, _PIECE):
        piece = slice(start, start + _PIECE)
        np.take(values, codes[piece], out=out[piece], mode="clip")


def unpack_rows(words: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """(rows, columns) codes from rows of a little-endian stream of bits, as bytes; (rows, bytes) in."""
    rows = words.shape[0]
    if bits == 8:
        return words[:, :columns]
    if bits == 4:
        codes = np.empty((rows, words.shape[1], 2), np.uint8)
        np.bitwise_and(words, 15, out=codes[:, :, 0])
        np.right_shift(words, 4, out=codes[:, :, 1])
        return codes.reshape(rows, -1)[:, :columns]
    stream = np.unpackbits(words, axis=1, count=columns * bits, bitorder="little").reshape(rows, columns, bits)
    return np.packbits(stream, axis=2, bitorder="little").reshape(rows, columns)
