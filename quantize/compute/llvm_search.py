"""Scale search as LLVM vectors of 64 lanes; ``scale_search`` documents the arithmetic.

Additions are made in a fixed order, and none is fused with a multiplication: every processor computes the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from qz.quantize.compute import scale_search, tables
from qz.quantize.compute.jit import array, bits, compiled, float_of, inlined, intrinsic
from qz.quantize.compute.llvm_blocks import _I32, _broadcast, _load, _pointer, _same, _store, _store_codes

_FLOAT = ir.FloatType()


def _half_sums(builder: Any, vector: Any, lanes: int = 64, until: int = 1) -> Any:
    """The sum of all lanes, by halves; ``until`` leaves a vector of so many sums."""
    while lanes > until:
        lanes //= 2
        low = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes, 2 * lanes)))
        vector = builder.fadd(builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high))
    return builder.extract_element(vector, _I32(0)) if until == 1 else vector


def _above(builder: Any, scaled: Any, quant_type: str) -> list[Any]:
    return [builder.fcmp_ordered(">", scaled, _same(_FLOAT, bound)) for bound in tables.bounds(quant_type).tolist()]


def _levels(builder: Any, above: list[Any], quant_type: str) -> Any:
    """In each lane the level after the last bound it is above."""
    levels = tables.QUANT_MAPS[quant_type][tables.order(quant_type)].tolist()
    chosen = _same(_FLOAT, levels[0])
    for is_above, level in zip(above, levels[1:], strict=True):
        chosen = builder.select(is_above, _same(_FLOAT, level), chosen)
    return chosen


def _fit_of(quant_type: str, weighted: bool) -> Any:
    @intrinsic
    def fit(_: Any, y: Any, inverse: Any, weights: Any, start: Any) -> Any:  # noqa: ARG001
        """A and B of the levels nearest to ``y * inverse``; ``weights[start : start + 64]`` where there are any."""
        pair = types.UniTuple(types.float32, 2)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = ir.Constant(ir.IntType(64), 0)
            values = _load(builder, _pointer(context, builder, signature.args[0], arguments[0], zero), _FLOAT)
            scaled = builder.fmul(values, _broadcast(builder, arguments[1]))
            q = _levels(builder, _above(builder, scaled, quant_type), quant_type)
            wq = q
            if weighted:
                at = _pointer(context, builder, signature.args[2], arguments[2], arguments[3])
                wq = builder.fmul(_load(builder, at, _FLOAT), q)
            a = _half_sums(builder, builder.fmul(wq, values))
            b = _half_sums(builder, builder.fmul(wq, q))
            return context.make_tuple(builder, pair, [a, b])

        return pair(y, types.float32, weights, types.int64), generate

    return fit


def _nearest_of(quant_type: str) -> Any:
    codes = tables.order(quant_type).tolist()

    @intrinsic
    def nearest(_: Any, values: Any, start: Any, inverse: Any, levels: Any, packed: Any) -> Any:  # noqa: ARG001
        """Codes, packed, and levels nearest to ``values[start : start + 64] * inverse``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = ir.Constant(ir.IntType(64), 0)
            loaded = _load(builder, _pointer(context, builder, signature.args[0], *arguments[:2]), _FLOAT)
            above = _above(builder, builder.fmul(loaded, _broadcast(builder, arguments[2])), quant_type)
            target = _pointer(context, builder, signature.args[3], arguments[3], zero)
            _store(builder, _levels(builder, above, quant_type), target)
            target = _pointer(context, builder, signature.args[4], arguments[4], zero)
            _store_codes(builder, above, codes, _I32, target)
            return context.get_dummy_value()

        return types.void(values, types.int64, types.float32, levels, packed), generate

    return nearest


@intrinsic
def _sum_64(_: Any, values: Any) -> Any:
    """The first 64 of ``values``, added by halves."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], zero)
        return _half_sums(builder, _load(builder, pointer, _FLOAT))

    return types.float32(values), generate


@inlined
def _round_bf16(value: Any) -> Any:
    raw = bits(value)
    return float_of((raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000))


@inlined
def _round_f16(value: Any) -> Any:
    """To nearest even; what overflows becomes at least 65536, which no float16 weight is near."""
    raw = bits(value)
    rounded = float_of((raw + np.uint32(0xFFF) + ((raw >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000))
    small = (value + np.float32(0.75)) - np.float32(0.75)
    return small if abs(value) < np.float32(2.0**-14) else rounded


def _search_of(quant_type: str, weighted: bool) -> Any:
    fit, nearest = _fit_of(quant_type, weighted), _nearest_of(quant_type)
    least, most = np.float32(scale_search.LEAST_ABSMAX), np.float32(scale_search.MOST_ABSMAX)
    refits, least_gain = scale_search.REFITS, np.float32(scale_search.LEAST_GAIN)

    @inlined
    def error(x: Any, scale: Any, inverse: Any, levels: Any, rounding: Any, weights: Any, first: Any) -> Any:
        """Σ w ((level × scale, as loaded, − x) / absmax)²; overwrites ``levels``."""
        for i in range(64):
            value = levels[i] * scale
            if rounding == 1:
                value = _round_bf16(value)
            elif rounding == 2:
                value = _round_f16(value)
            difference = (value - x[i]) * inverse
            squared = difference * difference
            levels[i] = weights[first + i] * squared if weighted else squared
        return _sum_64(levels)

    @compiled(
        types.void(
            array(types.float32),
            array(types.float32),
            types.int64,
            array(types.float32),
            types.int64,
            array(types.uint8, output=True),
            array(types.float32, output=True),
        )
    )
    def search(values: Any, weights: Any, column: int, inverses: Any, rounding: int, packed: Any, scales: Any) -> None:
        y, levels = np.empty(64, np.float32), np.empty(64, np.float32)
        codes = np.empty(32, np.uint8)
        columns = weights.size - 64
        for block in range(scales.size):
            absmax = scales[block]
            if not (absmax > least and absmax < most):
                continue
            first = (column + block * 64) % columns if weighted else 0
            x = values[block * 64 : block * 64 + 64]
            inverse = np.float32(1) / absmax
            for i in range(64):
                y[i] = x[i] * inverse
            best, sigma = np.float32(-1), np.float32(1)
            for candidate in range(inverses.size + refits):
                scaled_by = inverses[candidate] if candidate < inverses.size else np.float32(1) / sigma
                a, b = fit(y, scaled_by, weights, first)
                gain = a * a / b
                if gain > best:
                    best, sigma = gain, a / b
            nearest(y, 0, np.float32(1), levels, codes)
            limit = error(x, absmax, inverse, levels, rounding, weights, first) * least_gain
            found = absmax * sigma
            nearest(x, 0, np.float32(1) / found, levels, codes)
            if error(x, found, inverse, levels, rounding, weights, first) < limit:
                scales[block] = found
                packed[block * 32 : block * 32 + 32] = codes

    return search


def _encode_of(quant_type: str) -> Any:
    nearest = _nearest_of(quant_type)
    least = np.float32(scale_search.LEAST_SCALE)

    @compiled(types.void(array(types.float32), array(types.float32), array(types.uint8, output=True)))
    def encode(values: Any, scales: Any, packed: Any) -> None:
        levels, zeros = np.empty(64, np.float32), np.zeros(64, np.float32)
        for block in range(scales.size):
            target = packed[block * 32 : block * 32 + 32]
            if abs(scales[block]) >= least:
                nearest(values, block * 64, np.float32(1) / scales[block], levels, target)
            else:
                nearest(zeros, 0, np.float32(1), levels, target)

    return encode


search = {
    (quant_type, weighted): _search_of(quant_type, weighted)
    for quant_type in ("nf4", "fp4")
    for weighted in (False, True)
}
"""Improve ``packed`` and ``scales``, which begin as absmax gives them, in place: (quant type, weighted) → function.

Of ``values``, float32 in whole blocks, the first lies in ``column`` of its row; ``weights`` are
``scale_search.tiled_weights`` (any if not weighted). ``rounding``: 0 of float32, 1 of bfloat16, 2 of float16.
"""
encode = {quant_type: _encode_of(quant_type) for quant_type in ("nf4", "fp4")}
"""``packed`` = the nearest codes of ``values``, float32 in whole blocks, under the given ``scales``; by quant type."""
