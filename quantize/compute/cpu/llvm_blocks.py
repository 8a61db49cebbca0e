"""4-bit blocks to and from their codes, as LLVM vectors: what LLVM makes of plain loops is half as fast at best.

Nothing here is tied to a processor: LLVM maps vectors of 64 lanes to AVX-512, AVX2, SSE or NEON.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from qz.quantize.compute import tables
from qz.quantize.compute.cpu.jit import array, compiled, inlined, intrinsic

_LANES = 64
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


def _vector(element: Any, lanes: int = _LANES) -> Any:
    return ir.VectorType(element, lanes)


def _same(element: Any, value: Any, lanes: int = _LANES) -> Any:
    """A constant vector whose lanes all hold ``value``."""
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _broadcast(builder: Any, scalar: Any, lanes: int = _LANES) -> Any:
    single = builder.insert_element(ir.Constant(_vector(scalar.type, lanes), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(single, single, _same(_I32, 0, lanes))


def _pointer(context: Any, builder: Any, array_type: Any, value: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, value).data, [index])


def _load(builder: Any, pointer: Any, element: Any, lanes: int = _LANES) -> Any:
    """Consecutive elements from an address of any alignment."""
    loaded = builder.load(builder.bitcast(pointer, _vector(element, lanes).as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 1


@intrinsic
def _top(_: Any, values: Any, start: Any) -> Any:
    """Bits of the largest magnitude among 64 values: without the sign, floats order like unsigned integers."""
    width = values.dtype.bitwidth
    unsigned = types.Integer.from_bitwidth(width, False)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = ir.IntType(width)
        loaded = _load(builder, _pointer(context, builder, signature.args[0], arguments[0], arguments[1]), element)
        magnitudes = builder.and_(loaded, _same(element, 2 ** (width - 1) - 1))
        function = ir.FunctionType(element, [_vector(element)])
        name = f"llvm.vector.reduce.umax.v{_LANES}i{width}"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [magnitudes])

    return unsigned(values, start), generate


def _store_codes(builder: Any, above: list[Any], codes: list[int], lane: Any, pointer: Any) -> None:
    """Each lane takes the code after the last bound it is above; pairs become bytes, the first in the high half."""
    chosen = _same(lane, codes[0])
    for is_above, code in zip(above, codes[1:], strict=True):
        chosen = builder.select(is_above, _same(lane, code), chosen)
    # Little endian: the first lane of a pair is its lower half.
    double = ir.IntType(2 * lane.width)
    pairs = builder.bitcast(chosen, _vector(double, 32))
    merged = builder.or_(builder.shl(pairs, _same(double, 4, 32)), builder.lshr(pairs, _same(double, lane.width, 32)))
    _store(builder, builder.trunc(merged, _vector(_I8, 32)), pointer)


def _write_16(quant_type: str) -> Any:
    codes = tables.order(quant_type).tolist()

    @intrinsic
    def write(_: Any, values: Any, start: Any, cuts: Any, row: Any, packed: Any, stop: Any) -> Any:  # noqa: ARG001
        """Quantize ``values[start : start + 64]`` by the row of ``cut_points`` that belongs to their absmax."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
            cut = _pointer(context, builder, signature.args[2], arguments[2], builder.shl(arguments[3], _I64(4)))
            target = _pointer(context, builder, signature.args[4], arguments[4], arguments[5])
            x = _load(builder, source, _I16)
            negative = builder.ashr(x, _same(_I16, 15))
            ordered = builder.xor(x, builder.and_(negative, _same(_I16, 0x7FFF)))
            above = []
            for k in range(15):
                limit = builder.load(builder.gep(cut, [_I32(k)]))
                limit.align = 1
                above.append(builder.icmp_signed(">", ordered, _broadcast(builder, limit)))
            _store_codes(builder, above, codes, _I16, target)
            return context.get_dummy_value()

        return types.void(values, start, cuts, types.int64, packed, stop), generate

    return write


def _write_32(quant_type: str) -> Any:
    codes = tables.order(quant_type).tolist()
    bounds = tables.bounds(quant_type).tolist()

    @intrinsic
    def write(_: Any, values: Any, start: Any, inverse: Any, packed: Any, stop: Any) -> Any:  # noqa: ARG001
        """Quantize ``values[start : start + 64]``, scaled by ``inverse``."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
            target = _pointer(context, builder, signature.args[3], arguments[3], arguments[4])
            x = builder.fmul(_load(builder, source, ir.FloatType()), _broadcast(builder, arguments[2]))
            above = [builder.fcmp_ordered(">", x, _same(ir.FloatType(), bound)) for bound in bounds]
            _store_codes(builder, above, codes, _I32, target)
            return context.get_dummy_value()

        return types.void(values, start, types.float32, packed, stop), generate

    return write


_write_nf4_16, _write_fp4_16 = _write_16("nf4"), _write_16("fp4")
_write_nf4_32, _write_fp4_32 = _write_32("nf4"), _write_32("fp4")

_NON_FINITE = types.UniTuple(types.int64, 2)
_CUTS = types.Array(types.int16, 1, "C", readonly=True)


@compiled(
    _NON_FINITE(
        array(types.uint16),
        types.uint16,
        array(types.float32),
        _CUTS,
        types.boolean,
        array(types.uint8, output=True),
        array(types.float32, output=True),
    )
)
def quantize_16(
    values: Any, infinity: Any, magnitudes: Any, cuts: Any, nf4: Any, packed: Any, absmax: Any
) -> tuple[int, int]:
    """Whole blocks of "BF16" or "F16" bits, by integer comparison with the flattened ``tables.cut_points``.

    ``infinity``: the dtype's bits of it. ``magnitudes``: ``tables.magnitudes``. Returns the count and first index
    of non-finite values; the codes of their blocks are meaningless.
    """
    count, first = 0, -1
    for block in range(values.size // 64):
        start = block * 64
        top = _top(values, start)
        absmax[block] = magnitudes[top]
        if top >= infinity:
            for i in range(start, start + 64):
                if np.uint16(values[i] & np.uint16(0x7FFF)) >= infinity:
                    count += 1
                    if first < 0:
                        first = i
        if nf4:
            _write_nf4_16(values, start, cuts, top, packed, block * 32)
        else:
            _write_fp4_16(values, start, cuts, top, packed, block * 32)
    return count, first


@compiled(
    _NON_FINITE(array(types.float32), types.boolean, array(types.uint8, output=True), array(types.float32, output=True))
)
def quantize_32(values: Any, nf4: Any, packed: Any, absmax: Any) -> tuple[int, int]:
    """Whole blocks of float32 values; see ``quantize_16``."""
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


@compiled(
    types.void(
        array(types.float32),
        array(types.float32),
        array(types.uint8),
        array(types.uint8, output=True),
        array(types.float32, output=True),
    )
)
def quantize_tail(values: Any, bounds: Any, order: Any, packed: Any, absmax: Any) -> None:
    """The last, short block, as float32: divided by its clamped absmax, which is also what is stored."""
    top = np.float32(1e-38)
    for i in range(values.size):
        top = max(top, abs(values[i]))
    absmax[0] = top
    packed[:] = 0
    for i in range(values.size + values.size % 2):
        x = values[i] / top if i < values.size else np.float32(0)
        above = 0
        for k in range(15):
            above += x > bounds[k]
        packed[i // 2] |= order[above] << np.uint8(4 * (1 - i % 2))


def _look_up(builder: Any, codes: Any, table: list[float], lanes: int) -> Any:
    """``table[code]`` in each lane: a binary tree of choices, one level for each of a code's four bits."""
    values = [_same(ir.FloatType(), value, lanes) for value in table]
    for bit in (1, 2, 4, 8):
        masked = builder.and_(codes, _same(_I32, bit, lanes))
        is_set = builder.icmp_unsigned("!=", masked, _same(_I32, 0, lanes))
        values = [builder.select(is_set, *reversed(pair)) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _write_values(quant_type: str) -> Any:
    table = tables.QUANT_MAPS[quant_type].tolist()
    order = [lane for pair in zip(range(16), range(16, 32), strict=True) for lane in pair]

    @intrinsic
    def write(_: Any, packed: Any, start: Any, scale: Any, out: Any, to: Any) -> Any:  # noqa: ARG001
        """``out[to : to + 32]`` = the values of the 16 bytes from ``start`` on, times ``scale``, in float32."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
            target = _pointer(context, builder, signature.args[3], arguments[3], arguments[4])
            octets = builder.zext(_load(builder, source, _I8, 16), _vector(_I32, 16))
            high, low = builder.lshr(octets, _same(_I32, 4, 16)), builder.and_(octets, _same(_I32, 15, 16))
            codes = builder.shuffle_vector(high, low, ir.Constant(_vector(_I32, 32), order))
            values = _look_up(builder, codes, table, 32)
            _store(builder, builder.fmul(values, _broadcast(builder, arguments[2], 32)), target)
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
