"""Block scales that lose less than absmax in the same format: a signed search, then a least-squares fit.

For a block x of 64 values with absmax a, and y = x / a: for every candidate c = ±factor let q be the levels nearest to
y / c, A = Σ w·y·q and B = Σ w·q². The best scale for these codes is a·A / B, and it removes A² / B of the error. The
candidate that removes most is taken, its scale fitted, codes chosen for it, and the scale fitted again to these. Last,
codes are chosen for the scale in float32, and both are kept only if the error of the values as they are loaded, rounded
to the weight's dtype, is smaller than with absmax. Of equal candidates the first is kept, + before −.

A negative scale, which every loader multiplies by like any other, is worth as much to NF4 as the search itself. w is 1,
or what is known of each input's importance. Where it is 1, candidates are compared in whole numbers, y and q in steps
of 1 / ``GRID``: half the work, and only a near tie is decided otherwise.

All else is float32, elementwise or summed by halves (64 → 32 → … → 1), and nothing is fused, so that every backend and
processor finds the same bits.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qz.quantize.compute import tables
from qz.quantize.compute.once import once

FACTORS: Final = {"nf4": (0.93, 1.0, 1.07), "fp4": (0.86, 0.93, 1.0, 1.07, 1.14)}
"""Of absmax, without importance: more of them lower the error by 0.3 % at most."""
WEIGHTED_FACTORS: Final = tuple(round(0.4 + 0.05 * step, 2) for step in range(17))
"""With importance, where clipping an outlier of an input that hardly matters may be best: 0.40, 0.45 … 1.20."""
SIGNS: Final = {"nf4": (1.0, -1.0), "fp4": (1.0,)}
"""NF4 has eight positive and seven negative levels, FP4 as many of either."""
GRID: Final = 4096
"""Steps from 0 to absmax: the sum of 64 products fits in an int32."""
LEAST_ABSMAX: Final = 1e-30
MOST_ABSMAX: Final = 1e30
"""Blocks beyond these are left as they are: scales derived from theirs could not be represented."""
LEAST_SCALE: Final = 1e-38
"""Values under a scale closer to zero are encoded as zeros."""
LEAST_GAIN: Final = float(np.float32(1 - 2**-16))
"""The new error must be below the old one times this, which is more than rounding can feign."""


@once
def inverse_candidates(quant_type: str) -> tuple[float, ...]:
    """With importance, what y is multiplied by for each candidate, as float32 values: 1 / factor, -1 / factor, …"""
    inverses = np.float32(1) / np.array(WEIGHTED_FACTORS, np.float32)
    return tuple(float(inverse * np.float32(sign)) for inverse in inverses for sign in SIGNS[quant_type])


@once
def coarse_candidates(quant_type: str) -> tuple[tuple[NDArray[np.int16], NDArray[np.int16]], ...]:
    """For each candidate without importance, by ascending y on the grid: int16[15] bounds and int16[16] levels.

    A y above so many bounds has the level of that index.
    """
    levels = np.rint(tables.QUANT_MAPS[quant_type][tables.order(quant_type)].astype(np.float64) * GRID)
    found = []
    for factor in FACTORS[quant_type]:
        for sign in SIGNS[quant_type]:
            bounds = np.sort(np.floor(tables.bounds(quant_type).astype(np.float64) * factor * sign * GRID))
            found.append((bounds.astype(np.int16), (levels if sign > 0 else levels[::-1]).astype(np.int16)))
    return tuple(found)


def tiled_weights(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an error counts in each column of a row, continued so that a block may begin anywhere: float32[in + 64]."""
    tiled: NDArray[Any] = np.resize(importance, importance.size + 64)
    return np.ascontiguousarray(tiled, np.float32)
