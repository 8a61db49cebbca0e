"""Blocks of float32 to their 4-bit codes, and back, as LLVM vectors: what LLVM makes of plain loops is half as fast."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from qz.quantize.compute import tables
from qz.quantize.compute.cpu.jit import array, compiled, inlined, intrinsic
from qz.quantize.compute.cpu.llvm_vectors import (
    I8,
    I32,
    broadcast,
    largest_magnitude,
    load,
    pointer_to,
    same,
    store,
    store_codes,
    vector,
)


@intrinsic
def _top(_: Any, values: Any, start: Any) -> Any:
    """Bits of the largest magnitude among 64 values: without the sign, floats order like unsigned integers."""
    width = values.dtype.bitwidth
    unsigned = types.Integer.from_bitwidth(width, False)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = pointer_to(context, builder, signature.args[0], arguments[0], arguments[1])
        return largest_magnitude(builder, load(builder, pointer, ir.IntType(width)))

    return unsigned(values, start), generate


def _write_32(quant_type: str) -> Any:
    codes = tables.order(quant_type).tolist()
    bounds = tables.bounds(quant_type).tolist()

    @intrinsic
    def write(_: Any, values: Any, start: Any, inverse: Any, packed: Any, stop: Any) -> Any:  # noqa: ARG001
        """Quantize ``values[start : start + 64]``, scaled by ``inverse``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = pointer_to(context, builder, signature.args[0], arguments[0], arguments[1])
            target = pointer_to(context, builder, signature.args[3], arguments[3], arguments[4])
            x = builder.fmul(load(builder, source, ir.FloatType()), broadcast(builder, arguments[2]))
            above = [builder.fcmp_ordered(">", x, same(ir.FloatType(), bound)) for bound in bounds]
            store_codes(builder, above, codes, I32, target)
            return context.get_dummy_value()

        return types.void(values, start, types.float32, packed, stop), generate

    return write


_write_nf4_32, _write_fp4_32 = _write_32("nf4"), _write_32("fp4")

_NON_FINITE = types.UniTuple(types.int64, 2)


@compiled(
    _NON_FINITE(array(types.float32), types.boolean, array(types.uint8, output=True), array(types.float32, output=True))
)
def quantize_32(values: Any, nf4: Any, packed: Any, absmax: Any) -> tuple[int, int]:
    """Whole blocks of float32: the count and first index of values that are not finite, whose codes mean nothing."""
    count, first = 0, -1
    raw = values.view(np.uint32)
    magnitude = absmax.view(np.uint32)
    for block in range(values.size // 64):
        start = block * 64
        top = _top(raw, start)
        magnitude[block] = top
        if top >= np.uint32(0x7F800000):
            for i in range(start, start + 64):
                if np.uint32(raw[i] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000):
                    count += 1
                    if first < 0:
                        first = i
        inverse = np.float32(1) / max(absmax[block], np.float32(1e-38))
        if nf4:
            _write_nf4_32(values, start, inverse, packed, block * 32)
        else:
            _write_fp4_32(values, start, inverse, packed, block * 32)
    return count, first


def _look_up(builder: Any, codes: Any, table: list[float], lanes: int) -> Any:
    """``table[code]`` in each lane: a binary tree of choices, one level for each of a code's four bits."""
    values = [same(ir.FloatType(), value, lanes) for value in table]
    for bit in (1, 2, 4, 8):
        masked = builder.and_(codes, same(I32, bit, lanes))
        is_set = builder.icmp_unsigned("!=", masked, same(I32, 0, lanes))
        values = [builder.select(is_set, *reversed(pair)) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _write_values(quant_type: str) -> Any:
    table = tables.QUANT_MAPS[quant_type].tolist()
    order = [lane for pair in zip(range(16), range(16, 32), strict=True) for lane in pair]

    @intrinsic
    def write(_: Any, packed: Any, start: Any, scale: Any, out: Any, to: Any) -> Any:  # noqa: ARG001
        """``out[to : to + 32]`` = the values of the 16 bytes from ``start`` on, times ``scale``, in float32."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = pointer_to(context, builder, signature.args[0], arguments[0], arguments[1])
            target = pointer_to(context, builder, signature.args[3], arguments[3], arguments[4])
            octets = builder.zext(load(builder, source, I8, 16), vector(I32, 16))
            high, low = builder.lshr(octets, same(I32, 4, 16)), builder.and_(octets, same(I32, 15, 16))
            codes = builder.shuffle_vector(high, low, ir.Constant(vector(I32, 32), order))
            values = _look_up(builder, codes, table, 32)
            store(builder, builder.fmul(values, broadcast(builder, arguments[2], 32)), target)
            return context.get_dummy_value()

        return types.void(packed, start, types.float32, out, to), generate

    return write


_write_nf4_values, _write_fp4_values = _write_values("nf4"), _write_values("fp4")


@inlined
def dequantize(packed: Any, absmax: Any, nf4: Any, quant_map: Any, blocksize: int, out: Any) -> None:
    """Values × absmax in float32; the block size is a multiple of 32. For use inside compiled functions."""
    whole, per_block = out.size // 32, blocksize // 32
    for block in range(absmax.size):
        for step in range(block * per_block, min((block + 1) * per_block, whole)):
            if nf4:
                _write_nf4_values(packed, step * 16, absmax[block], out, step * 32)
            else:
                _write_fp4_values(packed, step * 16, absmax[block], out, step * 32)
    for i in range(whole * 32, out.size):
        code = np.uint8(packed[i // 2] & 15 if i % 2 else packed[i // 2] >> 4)
        out[i] = quant_map[code] * absmax[i // blocksize]
