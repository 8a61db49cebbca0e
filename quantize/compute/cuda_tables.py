"""The tables by which kernels of the CPU write, byte for byte, what bitsandbytes' CUDA kernels write of 16-bit values.

``kQuantizeBlockwiseSmall`` and ``kInt8VectorQuant`` (csrc/kernels.cu, 0.50.2) are built with ``--use_fast_math``: the
block is scaled by ``rcp.approx.ftz`` of its absmax, and every float32 that is subnormal counts as zero. So a block
without a normal absmax is scaled by infinity, and each of its values becomes NaN, which no comparison is true for; one
with an absmax above 2^126 is scaled by zero.

``rcp.approx`` may be off by one in the last place. No code of NF4 in bfloat16 depends on that, whichever way it is off,
so this one is the same on every GPU; all others are known where the reciprocals were measured (``MEASURED``).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qz.quantize.compute import tables
from qz.quantize.compute.once import once

MEASURED: Final = ((9, 0),)
"""Compute capabilities whose reciprocals are ``reciprocal_steps``."""
_TINY: Final = np.float32(2.0**-126)
"""The smallest normal float32."""
_FP4_BOUNDS: Final = np.array(
    [0, 0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)
"""``dQuantizeFP4``: magnitudes above them take the next code. What is below zero has a sign, the first code too."""
_STEPS_UP: Final = (
    "00106800000080000000001060c0400000201840000000000018400060000008"
    "0800000000a0c0000000002000001000201810c0404001004620100040802050"
    "01c0900110001800000000000000100001b000101801000c0000088000000000"
    "00007400050401000000000000aa000400000090800080000080001804000000"
)
_STEPS_DOWN: Final = (
    "0202000080020002020403800000000301000000800090000000021400000000"
    "0000200100000000040000040000000000004001000000140000006000000000"
    "0000000000020000000000000200000000000000000000000000000000010000"
    "00010000000000000000000000000000000000000000022c0400000000002080"
)
"""A bit for each of the 1024: measured on one H100, for every exponent the same."""


def is_known(method: str, dtype: str, capability: tuple[int, int] | None) -> bool:
    """Whether the bytes of a method for values of a dtype are known, on a GPU of this compute capability."""
    if (method, dtype) == ("nf4", "BF16"):
        return True
    return capability in MEASURED and (method == "int8" or dtype != "F32")


@once
def reciprocal_steps() -> npt.NDArray[np.int8]:
    """By the ten bits after the leading one of x, what ``rcp.approx`` of x differs by from 1 / x, in last places."""
    steps = np.zeros(1024, np.int8)
    for digits, step in ((_STEPS_UP, 1), (_STEPS_DOWN, -1)):
        marked = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
        steps[np.flatnonzero(marked)] = step
    steps.flags.writeable = False
    return steps


def reciprocals(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``rcp.approx.ftz`` of values that a 16-bit dtype holds, none of them negative."""
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / _flushed(values)
    steps = reciprocal_steps()[(values.view(np.uint32) >> 13) & 1023]
    moved = np.where(np.isfinite(inverse), inverse.view(np.int32) + steps, inverse.view(np.int32))
    return _flushed(moved.astype(np.int32).view(np.float32))


def order(quant_type: str) -> npt.NDArray[np.uint8]:
    """As ``tables.order``; of fp4's two zeros the one with a sign, which stands for negative values, comes first."""
    codes = tables.order(quant_type)
    if quant_type == "fp4":
        codes[[7, 8]] = 8, 0
    return codes


@once
def magnitudes(dtype: str) -> npt.NDArray[np.float32]:
    """As ``tables.magnitudes``: the absmax that is stored for each of them."""
    return _flushed(tables.magnitudes(dtype))


@once
def cut_points(quant_type: str, dtype: str) -> npt.NDArray[np.int16]:
    """As ``tables.cut_points``, for the codes in this module's ``order``."""
    limit = tables.infinity_bits(dtype)
    inverse = reciprocals(tables.magnitudes(dtype)[:limit])
    if quant_type == "nf4":
        bounds = tables.bounds(quant_type)
    else:
        bounds = np.concatenate([-_FP4_BOUNDS[::-1], _FP4_BOUNDS[1:]])
    table = np.zeros((32768, 16), np.int16)
    for k, bound in enumerate(bounds):
        negative = k < (bounds < 0).sum() or (quant_type == "fp4" and bound == 0)
        # The first magnitude that is beyond the bound, or not within it: the comparison is monotonic in the magnitude.
        low, high = np.zeros(limit, np.int32), np.full(limit, limit, np.int32)
        while bool((low < high).any()):
            middle = (low + high) >> 1
            scaled = _scaled(np.minimum(middle, limit - 1), inverse, dtype)
            with np.errstate(invalid="ignore"):
                is_beyond = ~(scaled < -bound) if negative and quant_type == "nf4" else scaled > abs(bound)
            high, low = np.where(is_beyond, middle, high), np.where(is_beyond, low, np.minimum(middle + 1, high))
        table[:limit, k] = np.where(low == limit, -32768, ~low) if negative else low - 1
    if quant_type == "nf4":
        table[:limit][np.isinf(inverse)] = 32767
    return table


def _scaled(bits: npt.NDArray[np.int32], inverse: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    return product(_flushed(tables.magnitudes(dtype)[bits]), inverse)


def product(values: npt.NDArray[np.float32], inverse: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Zero where the magnitude is below the smallest normal number once its 24 bits are rounded, not as subnormal."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        exact = values.astype(np.float64) * inverse
        rounded = exact.astype(np.float32)
    least = float(_TINY) * (1 - 2.0**-25)  # not a float32, which would be _TINY
    flushed: npt.NDArray[Any] = np.where(np.abs(exact) < least, np.float32(0), rounded)
    return flushed


def _flushed(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    flushed: npt.NDArray[Any] = np.where(values < _TINY, np.float32(0), values)
    return flushed
