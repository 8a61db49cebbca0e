"""Scale search as LLVM vectors of 64 lanes; ``scale_search`` documents the arithmetic.

Additions are made in a fixed order, and none is fused with a multiplication: every processor computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from qz.quantize.compute import scale_search, tables
from qz.quantize.compute.cpu import llvm_lookup
from qz.quantize.compute.cpu.jit import array, compiled, inlined, intrinsic
from qz.quantize.compute.cpu.llvm_vectors import (
    I16,
    I32,
    broadcast,
    load,
    pointer_to,
    same,
    store,
    store_codes,
    store_pairs,
)

_FLOAT = ir.FloatType()


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    """The sum of 64 lanes, by halves."""
    lanes = 64
    while lanes > 1:
        lanes //= 2
        low = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes, 2 * lanes)))
        vector = builder.fadd(builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high))
    return builder.extract_element(vector, I32(0))


def _above(builder: Any, scaled: Any, quant_type: str) -> list[Any]:
    return [builder.fcmp_ordered(">", scaled, same(_FLOAT, bound)) for bound in tables.bounds(quant_type).tolist()]


def _levels(builder: Any, above: list[Any], quant_type: str) -> Any:
    """In each lane the level after the last bound it is above."""
    levels = tables.QUANT_MAPS[quant_type][tables.order(quant_type)].tolist()
    chosen = same(_FLOAT, levels[0])
    for is_above, level in zip(above, levels[1:], strict=True):
        chosen = builder.select(is_above, same(_FLOAT, level), chosen)
    return chosen


def _nearest_levels(context: Any, builder: Any, values: Any, quant_type: str) -> Any:
    if llvm_lookup.usable(context):
        return llvm_lookup.levels(builder, values, quant_type)
    return _levels(builder, _above(builder, values, quant_type), quant_type)


def _fit_of(quant_type: str, weighted: bool) -> Any:
    @intrinsic
    def fit(_: Any, y: Any, inverse: Any, weights: Any, start: Any) -> Any:  # noqa: ARG001
        """A and B of the levels nearest to ``y * inverse``; ``weights[start : start + 64]`` where there are any."""
        pair = types.UniTuple(types.float32, 2)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = ir.Constant(ir.IntType(64), 0)
            values = load(builder, pointer_to(context, builder, signature.args[0], arguments[0], zero), _FLOAT)
            scaled = builder.fmul(values, broadcast(builder, arguments[1]))
            q = _nearest_levels(context, builder, scaled, quant_type)
            wq = q
            if weighted:
                at = pointer_to(context, builder, signature.args[2], arguments[2], arguments[3])
                wq = builder.fmul(load(builder, at, _FLOAT), q)
            a = _sum_of_lanes(builder, builder.fmul(wq, values))
            b = _sum_of_lanes(builder, builder.fmul(wq, q))
            return context.make_tuple(builder, pair, [a, b])

        return pair(y, types.float32, weights, types.int64), generate

    return fit


def _coarse_levels(context: Any, builder: Any, whole: Any) -> Callable[[list[int], list[int]], Any]:
    """From bounds and levels to the levels of ``whole``, int16 of 64 lanes."""
    if llvm_lookup.usable(context):
        index = llvm_lookup.coarse_index(builder, whole)
        return lambda bounds, levels: llvm_lookup.coarse_levels(builder, whole, index, bounds, levels)

    def compared(bounds: list[int], levels: list[int]) -> Any:
        q = same(I16, levels[0])
        for bound, level in zip(bounds, levels[1:], strict=True):
            q = builder.select(builder.icmp_signed(">", whole, same(I16, bound)), same(I16, level), q)
        return q

    return compared


def _coarse_of(quant_type: str) -> Any:
    @intrinsic
    def coarse(_: Any, y: Any) -> Any:
        """The least-squares scale of the best candidate without importance, in whole numbers."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            at = pointer_to(context, builder, signature.args[0], arguments[0], ir.Constant(ir.IntType(64), 0))
            # The last place of the sum is 1, its low half the whole number, rounded half to even.
            steps = builder.fmul(load(builder, at, _FLOAT), same(_FLOAT, float(scale_search.GRID)))
            moved = builder.bitcast(builder.fadd(steps, same(_FLOAT, 12582912.0)), ir.VectorType(I32, 64))
            whole = builder.trunc(moved, ir.VectorType(I16, 64))
            products: tuple[list[Any], list[Any]] = ([], [])
            nearest = _coarse_levels(context, builder, whole)
            for bounds, levels in scale_search.coarse_candidates(quant_type):
                q = nearest(bounds.tolist(), levels.tolist())
                for each, factor in zip(products, (whole, q), strict=True):
                    each.append(_products(builder, factor, q))
            a, b = (builder.sitofp(_sums(builder, each), ir.VectorType(_FLOAT, 8)) for each in products)
            gains, scales = builder.fdiv(builder.fmul(a, a), b), builder.fdiv(a, b)
            best, sigma = ir.Constant(_FLOAT, -1.0), ir.Constant(_FLOAT, 1.0)
            for lane in range(len(products[0])):
                gain, scale = (builder.extract_element(each, I32(lane)) for each in (gains, scales))
                better = builder.fcmp_ordered(">", gain, best)
                best, sigma = builder.select(better, gain, best), builder.select(better, scale, sigma)
            return sigma

        return types.float32(y), generate

    return coarse


def _products(builder: Any, one: Any, other: Any) -> Any:
    """The products of 64 int16, added four by four: 16 int32."""
    wide = ir.VectorType(I32, 64)
    products = builder.mul(builder.sext(one, wide), builder.sext(other, wide))
    # Neighbours first: where a processor multiplies and adds pairs in one instruction, LLVM takes it.
    pairs = _folded(builder, products, products, 1, 32)
    return _folded(builder, pairs, pairs, 16, 16)


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """int32[8], each the sum of the 16 lanes of one of at most 8 vectors: two vectors become one, three times."""
    vectors = vectors + [same(I32, 0, 16)] * (8 - len(vectors))
    for apart in (8, 4, 2):
        vectors = [_folded(builder, *pair, apart, 16) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return _folded(builder, vectors[0], vectors[0], 1, 8)


def _folded(builder: Any, one: Any, other: Any, apart: int, count: int) -> Any:
    """Of the lanes of one vector, and then of the other, the first ``count`` sums of two that are so far ``apart``."""
    lanes = [lane for lane in range(2 * one.type.count) if not lane // apart % 2][:count]
    first, second = (ir.Constant(ir.VectorType(I32, count), [lane + by for lane in lanes]) for by in (0, apart))
    return builder.add(builder.shuffle_vector(one, other, first), builder.shuffle_vector(one, other, second))


def _nearest_of(quant_type: str) -> Any:
    codes = tables.order(quant_type).tolist()

    @intrinsic
    def nearest(_: Any, values: Any, start: Any, inverse: Any, levels: Any, packed: Any) -> Any:  # noqa: ARG001
        """Codes, packed, and levels nearest to ``values[start : start + 64] * inverse``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = ir.Constant(ir.IntType(64), 0)
            loaded = load(builder, pointer_to(context, builder, signature.args[0], *arguments[:2]), _FLOAT)
            scaled = builder.fmul(loaded, broadcast(builder, arguments[2]))
            levels_at, packed_at = (pointer_to(context, builder, signature.args[i], arguments[i], zero) for i in (3, 4))
            if llvm_lookup.usable(context) and codes == sorted(codes):
                positions = llvm_lookup.positions(builder, scaled, quant_type)
                store(builder, llvm_lookup.levels_at(builder, positions, quant_type), levels_at)
                store_pairs(builder, positions, packed_at)
                return context.get_dummy_value()
            above = _above(builder, scaled, quant_type)
            store(builder, _levels(builder, above, quant_type), levels_at)
            store_codes(builder, above, codes, I32, packed_at)
            return context.get_dummy_value()

        return types.void(values, types.int64, types.float32, levels, packed), generate

    return nearest


def _levels_of(quant_type: str) -> Any:
    @intrinsic
    def nearest_levels(_: Any, y: Any, levels: Any) -> Any:
        """Levels nearest to the 64 values of ``y``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = ir.Constant(ir.IntType(64), 0)
            values = load(builder, pointer_to(context, builder, signature.args[0], arguments[0], zero), _FLOAT)
            target = pointer_to(context, builder, signature.args[1], arguments[1], zero)
            store(builder, _nearest_levels(context, builder, values, quant_type), target)
            return context.get_dummy_value()

        return types.void(y, levels), generate

    return nearest_levels


def _rounded(builder: Any, values: Any, dtype: str) -> Any:
    """Each value rounded to the dtype, to nearest even. What overflows float16 becomes at least 65536."""
    if dtype == "F32":
        return values
    wide, dropped = ir.VectorType(I32, 64), {"BF16": 16, "F16": 13}[dtype]
    raw = builder.bitcast(values, wide)
    odd = builder.and_(builder.lshr(raw, same(I32, dropped)), same(I32, 1))
    up = builder.add(builder.add(raw, same(I32, 2 ** (dropped - 1) - 1)), odd)
    rounded = builder.bitcast(builder.and_(up, same(I32, 2**32 - 2**dropped)), values.type)
    if dtype == "BF16":
        return rounded
    # Below 2^-14 float16 has a fixed step of 2^-24, which is the last place of float32 numbers in [0.5, 1).
    three_quarters = same(_FLOAT, 0.75)
    small = builder.fsub(builder.fadd(values, three_quarters), three_quarters)
    magnitude = builder.bitcast(builder.and_(raw, same(I32, 2**31 - 1)), values.type)
    return builder.select(builder.fcmp_ordered("<", magnitude, same(_FLOAT, 2.0**-14)), small, rounded)


def _error_of(dtype: str, weighted: bool) -> Any:
    @intrinsic
    def error(_: Any, x: Any, levels: Any, scale: Any, inverse: Any, weights: Any, start: Any) -> Any:  # noqa: ARG001
        """Σ w ((level × scale, as loaded, − x) × inverse)²."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = ir.Constant(ir.IntType(64), 0)
            both = (pointer_to(context, builder, signature.args[i], arguments[i], zero) for i in (0, 1))
            values, q = (load(builder, pointer, _FLOAT) for pointer in both)
            loaded = _rounded(builder, builder.fmul(q, broadcast(builder, arguments[2])), dtype)
            difference = builder.fmul(builder.fsub(loaded, values), broadcast(builder, arguments[3]))
            squared = builder.fmul(difference, difference)
            if weighted:
                at = pointer_to(context, builder, signature.args[4], arguments[4], arguments[5])
                squared = builder.fmul(load(builder, at, _FLOAT), squared)
            return _sum_of_lanes(builder, squared)

        return types.float32(x, levels, types.float32, types.float32, weights, types.int64), generate

    return error


def _search_of(quant_type: str, weighted: bool) -> Any:
    fit, nearest, coarse = _fit_of(quant_type, weighted), _nearest_of(quant_type), _coarse_of(quant_type)
    nearest_levels = _levels_of(quant_type)
    least, most = np.float32(scale_search.LEAST_ABSMAX), np.float32(scale_search.MOST_ABSMAX)
    least_gain = np.float32(scale_search.LEAST_GAIN)

    @inlined
    def candidate(y: Any, inverses: Any, weights: Any, first: Any) -> Any:
        """The least-squares scale of the best candidate."""
        if not weighted:
            return coarse(y)
        best, sigma = np.float32(-1), np.float32(1)
        for i in range(inverses.size):
            a, b = fit(y, inverses[i], weights, first)
            gain = a * a / b
            if gain > best:
                best, sigma = gain, a / b
        return sigma

    of_f32, of_bf16, of_f16 = (_error_of(dtype, weighted) for dtype in ("F32", "BF16", "F16"))

    @inlined
    def error(x: Any, scale: Any, inverse: Any, levels: Any, rounding: Any, weights: Any, first: Any) -> Any:
        if rounding == 1:
            return of_bf16(x, levels, scale, inverse, weights, first)
        if rounding == 2:
            return of_f16(x, levels, scale, inverse, weights, first)
        return of_f32(x, levels, scale, inverse, weights, first)

    @compiled(
        types.void(
            array(types.float32),
            array(types.float32),
            types.int64,
            array(types.float32),
            types.int64,
            array(types.uint8, output=True),
            array(types.float32, output=True),
        ),
        name=f"search_{quant_type}{'_weighted' if weighted else ''}",
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
            a, b = fit(y, np.float32(1) / candidate(y, inverses, weights, first), weights, first)
            nearest_levels(y, levels)
            limit = error(x, absmax, inverse, levels, rounding, weights, first) * least_gain
            found = absmax * (a / b)
            nearest(x, 0, np.float32(1) / found, levels, codes)
            if error(x, found, inverse, levels, rounding, weights, first) < limit:
                scales[block] = found
                target = packed[block * 32 : block * 32 + 32]
                for i in range(32):  # `target[:] = codes` takes numba seconds: an error with strings put together
                    target[i] = codes[i]

    return search


def _encode_of(quant_type: str) -> Any:
    nearest = _nearest_of(quant_type)
    least = np.float32(scale_search.LEAST_SCALE)

    @compiled(
        types.void(array(types.float32), array(types.float32), array(types.uint8, output=True)),
        name=f"encode_{quant_type}",
    )
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
