"""The tables of bitsandbytes' data types: quantization maps, the bounds between codes, and cut points for 16-bit input.

Every table equals bitsandbytes 0.50.2 to the last bit; ``tests/test_kernels.py`` compares them with the library.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qz.quantize.compute.once import once

QUANT_MAPS: Final[dict[str, npt.NDArray[np.float32]]] = {
    # functional.get_4bit_type: quantiles of N(0, 1), see QLoRA (arXiv 2305.14314).
    "nf4": np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
         0.7229568362236023, 1.0],
        dtype=np.float32,
    ),
    # One sign, two exponent and one mantissa bit; bitsandbytes writes code 8 as +0, not -0.
    "fp4": np.array(
        [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], dtype=np.float32
    ) / np.float32(12),
}  # fmt: skip
"""Code → value, float32[16], as stored under ``quant_map``. Do not write into them."""

_SMALLEST_SCALE: Final = np.float32(1e-38)
"""Both block scales are clamped to this before the division, so an all-zero block divides by it and not by zero."""


def order(quant_type: str) -> npt.NDArray[np.uint8]:
    """Codes in ascending order of their value, uint8[16]; of fp4's two zeros, 0 comes before 8."""
    return np.argsort(QUANT_MAPS[quant_type], kind="stable").astype(np.uint8)


def bounds(quant_type: str) -> npt.NDArray[np.float32]:
    """Midpoints between neighbours, float32[15]. A scaled value has the code ``order[sum(value > bounds)]``."""
    values = QUANT_MAPS[quant_type][order(quant_type)]
    midpoints: npt.NDArray[np.float32] = (values[:-1] + values[1:]) / np.float32(2)
    return midpoints


@once
def nested_quant_map() -> npt.NDArray[np.float32]:
    """The signed dynamic 8-bit map that double quantization uses for absmax, float32[256], ascending.

    ``functional.create_dynamic_map()``; Dettmers, arXiv 1511.04561. ``torch.linspace`` uses a fused multiply-add, which
    float64 reproduces.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    first = np.float32(0.1)
    for exponent in range(7):
        intervals = 2**exponent
        step = np.float64((np.float32(1) - first) / np.float32(intervals))
        index = np.arange(intervals + 1)
        from_first, from_last = np.float64(first) + step * index, 1 - step * (intervals - index)
        edges = np.where(index < (intervals + 1) // 2, from_first, from_last).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [means, -means]
    table = np.sort(np.concatenate(values))
    table.flags.writeable = False
    return table


@once
def nested_codes() -> npt.NDArray[np.uint8]:
    """Code of each of the 65,536 steps in [-1, 1] that bitsandbytes' 8-bit CPU quantization knows (cpu_ops.cpp)."""
    table = nested_quant_map()
    midpoints = (table[:-1] + table[1:]) * np.float32(0.5)
    step = np.arange(65536, dtype=np.float32)
    normed = (step + step) / np.float32(65535) - np.float32(1)
    return np.searchsorted(midpoints, normed, side="left").astype(np.uint8)


def widen(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """The float32 values of ``bits`` (uint16), which hold "BF16" or "F16"."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        return bits.view(np.float16).astype(np.float32)


def infinity_bits(dtype: str) -> int:
    """Bits of +inf in "BF16" or "F16": magnitudes at or above this are not finite."""
    return 0x7F80 if dtype == "BF16" else 0x7C00


@once
def magnitudes(dtype: str) -> npt.NDArray[np.float32]:
    """The float32 value of every non-negative "BF16" or "F16", by its bits, float32[32768]."""
    return widen(np.arange(32768, dtype=np.uint16), dtype)


@once
def cut_points(quant_type: str, dtype: str) -> npt.NDArray[np.int16]:
    """For every absmax of a 16-bit dtype, the largest inputs that stay below each bound: int16[32768, 16], 1 MB.

    Row: the absmax's bits. Column k: the largest x, as an *ordered* integer (``s ^ ((s >> 15) & 0x7fff)`` of its bits
    as int16 ``s``), for which ``fl32(x * fl32(1 / max(absmax, 1e-38))) <= bounds[k]``. The product is monotone in x, so
    ``sum(ordered(x) > cut_points[absmax])`` is bitsandbytes' code position exactly, without any floating point.
    Column 15 is unused; rows of non-finite absmax are meaningless.
    """
    limit = infinity_bits(dtype)
    scale = magnitudes(dtype)[:limit]
    inverse = np.float32(1) / np.maximum(scale, _SMALLEST_SCALE)
    table = np.zeros((32768, 16), np.int16)
    for k, bound in enumerate(bounds(quant_type)):
        # |x| <= absmax, so a search among magnitudes is enough: 15 halvings, and it treats both signs alike.
        negative = bool(bound < 0)
        low, high = np.zeros(limit, np.int32), np.full(limit, limit - 1, np.int32)
        # bound >= 0: largest magnitude with m * inverse <= bound. bound < 0: smallest with m * inverse >= -bound.
        while bool((low < high).any()):
            middle = (low + high + (0 if negative else 1)) >> 1
            scaled = magnitudes(dtype)[middle] * inverse
            if negative:
                inside = scaled >= -bound
                high, low = np.where(inside, middle, high), np.where(inside, low, middle + 1)
            else:
                inside = scaled <= bound
                low, high = np.where(inside, middle, low), np.where(inside, high, middle - 1)
        table[:limit, k] = ~low if negative else low
    return table
