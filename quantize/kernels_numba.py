"""The kernels compiled by numba: loops over blocks and rows that LLVM turns into vector code.

Each releases the GIL and uses the calling thread only. Inputs may be read-only or unaligned. ``kernels`` documents the
arguments and checks them; here they are trusted. Blocks and rows with non-finite values are counted, not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

from qz.quantize import quant_maps

_Array = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_U16_IN = types.Array(types.uint16, 1, "C", readonly=True, aligned=False)
_F32_IN = types.Array(types.float32, 1, "C", readonly=True, aligned=False)
_U8_IN = types.Array(types.uint8, 1, "C", readonly=True, aligned=False)
_I8_IN = types.Array(types.int8, 1, "C", readonly=True, aligned=False)
_CUTS = types.Array(types.int16, 2, "C", readonly=True, aligned=False)
_U8 = types.Array(types.uint8, 1, "C", aligned=False)
_I8 = types.Array(types.int8, 1, "C", aligned=False)
_U16 = types.Array(types.uint16, 1, "C", aligned=False)
_F32 = types.Array(types.float32, 1, "C", aligned=False)
_NON_FINITE = types.UniTuple(types.int64, 2)
_SUMS = types.UniTuple(types.float64, 3)


def _compiled(*signatures: Any, inline: bool = False) -> Callable[[_Function], _Function]:
    """``numba.njit`` for these signatures only; numba has no types of its own, so it is cast here, once."""
    options: dict[str, Any] = {"inline": "always"} if inline else {"nogil": True, "cache": True}

    def decorate(function: _Function) -> _Function:
        compile_ = numba.njit(list(signatures) or None, error_model="numpy", **options)
        return cast(_Function, compile_(function))

    return decorate


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _bits(_: Any, value: Any) -> Any:  # noqa: ARG001 (numba calls it with types)
    """The bits of a float32, as uint32."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def _float(_: Any, value: Any) -> Any:  # noqa: ARG001
    """The float32 of these bits (truncated to uint32)."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@_compiled(_NON_FINITE(_U16_IN, types.uint16, _F32_IN, _CUTS, _U8_IN, _U8, _F32))
def _quantize_4bit_16(
    values: Any, infinity: Any, magnitudes: Any, cuts: Any, order: Any, packed: Any, absmax: Any
) -> tuple[int, int]:
    """Whole blocks of 64 "BF16" or "F16" values, by integer comparison with ``quant_maps.cut_points``."""
    count, first = 0, -1
    codes = np.empty(64, np.uint8)
    for block in range(values.size // 64):
        start = block * 64
        top = np.uint16(0)
        for i in range(64):
            top = max(top, np.uint16(values[start + i] & np.uint16(0x7FFF)))
        absmax[block] = magnitudes[top]
        if top >= infinity:
            for i in range(64):
                if np.uint16(values[start + i] & np.uint16(0x7FFF)) >= infinity:
                    count += 1
                    if first < 0:
                        first = start + i
        cut = cuts[top]
        for i in range(64):
            x = np.int16(values[start + i])
            x ^= (x >> np.int16(15)) & np.int16(0x7FFF)
            above = np.uint8(0)
            for k in range(15):
                above += np.uint8(x > cut[k])
            codes[i] = order[above]
        for i in range(32):
            packed[block * 32 + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    return count, first


@_compiled(_NON_FINITE(_F32_IN, _F32_IN, _U8_IN, _U8, _F32))
def _quantize_4bit_32(values: Any, bounds: Any, order: Any, packed: Any, absmax: Any) -> tuple[int, int]:
    """Whole blocks of 64 float32 values."""
    count, first = 0, -1
    codes = np.empty(64, np.uint8)
    for block in range(values.size // 64):
        start = block * 64
        top = np.float32(0)
        bad = 0
        for i in range(64):
            x = abs(values[start + i])
            top = max(top, x)
            bad += not x < np.float32(np.inf)
        absmax[block] = top
        if bad:
            count += bad
            if first < 0:
                first = start
                while abs(values[first]) < np.float32(np.inf):
                    first += 1
        inverse = np.float32(1) / max(top, np.float32(1e-38))
        for i in range(64):
            x = values[start + i] * inverse
            above = np.uint8(0)
            for k in range(15):
                above += np.uint8(x > bounds[k])
            codes[i] = order[above]
        for i in range(32):
            packed[block * 32 + i] = (codes[2 * i] << np.uint8(4)) | codes[2 * i + 1]
    return count, first


@_compiled(types.void(_F32_IN, _F32_IN, _U8_IN, _U8, _F32))
def _quantize_4bit_tail(values: Any, bounds: Any, order: Any, packed: Any, absmax: Any) -> None:
    """The last, short block: divided by its clamped absmax, which is also what is stored."""
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


@_compiled(inline=True)
def _half(value: Any) -> Any:
    """``value`` rounded to float16, to nearest even, as float32; magnitudes that overflow become >= 65536."""
    bits = _bits(value)
    rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    # Below 2^-14 float16 has a fixed step of 2^-24, which is the last place of float32 numbers in [0.5, 1).
    small = (value + np.float32(0.75)) - np.float32(0.75)
    return small if abs(value) < np.float32(2.0**-14) else _float(rounded)


@_compiled(inline=True)
def _widen_bf16(bits: Any) -> Any:
    return _float(np.uint32(bits) << np.uint32(16))


@_compiled(inline=True)
def _byte(value: Any) -> Any:
    """Round half to even of a float32 in [-128, 127], as int8: the sum's last place is 1, its low byte the integer."""
    return np.int8(_bits(value + np.float32(12582912)))


@_compiled(_NON_FINITE(_U16_IN, types.int64, _I8, _F32))
def _quantize_int8_bf16(values: Any, cols: int, weight: Any, scb: Any) -> tuple[int, int]:
    count, first = 0, -1
    for row in range(values.size // cols):
        start = row * cols
        top = np.uint16(0)
        for i in range(cols):
            top = max(top, np.uint16(values[start + i] & np.uint16(0x7FFF)))
        largest = _half(_widen_bf16(top))
        scb[row] = largest
        if not largest < np.float32(65536):
            for i in range(cols):
                if not abs(_half(_widen_bf16(values[start + i]))) < np.float32(65536):
                    count += 1
                    if first < 0:
                        first = start + i
        scale = np.float32(1) / largest * np.float32(127) if largest > 0 else np.float32(0)
        for i in range(cols):
            weight[start + i] = _byte(_half(_widen_bf16(values[start + i])) * scale)
    return count, first


@_compiled(_NON_FINITE(_U16_IN, types.int64, _F32_IN, _I8, _F32))
def _quantize_int8_f16(values: Any, cols: int, magnitudes: Any, weight: Any, scb: Any) -> tuple[int, int]:
    count, first = 0, -1
    for row in range(values.size // cols):
        start = row * cols
        top = np.uint16(0)
        for i in range(cols):
            top = max(top, np.uint16(values[start + i] & np.uint16(0x7FFF)))
        largest = magnitudes[top]
        scb[row] = largest
        if top >= np.uint16(0x7C00):
            for i in range(cols):
                if np.uint16(values[start + i] & np.uint16(0x7FFF)) >= np.uint16(0x7C00):
                    count += 1
                    if first < 0:
                        first = start + i
        scale = np.float32(1) / largest * np.float32(127) if largest > 0 else np.float32(0)
        for i in range(cols):
            bits = np.uint32(values[start + i])
            # Exponent and mantissa moved into place, then the bias corrected by an exact multiplication.
            magnitude = _float((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
            x = _float(_bits(magnitude) | ((bits & np.uint32(0x8000)) << np.uint32(16)))
            weight[start + i] = _byte(x * scale)
    return count, first


@_compiled(_NON_FINITE(_F32_IN, types.int64, _I8, _F32))
def _quantize_int8_f32(values: Any, cols: int, weight: Any, scb: Any) -> tuple[int, int]:
    count, first = 0, -1
    for row in range(values.size // cols):
        start = row * cols
        top = np.float32(0)
        bad = 0
        for i in range(cols):
            x = abs(values[start + i])
            top = max(top, x)
            bad += not x < np.float32(65520)
        largest = _half(top)
        scb[row] = largest
        if bad:
            count += bad
            if first < 0:
                first = start
                while abs(values[first]) < np.float32(65520):
                    first += 1
        scale = np.float32(1) / largest * np.float32(127) if largest > 0 else np.float32(0)
        for i in range(cols):
            weight[start + i] = _byte(_half(values[start + i]) * scale)
    return count, first


@_compiled(types.void(_U8_IN, _F32_IN, _F32_IN, types.int64, _F32))
def _dequantize_4bit_f32(packed: Any, absmax: Any, quant_map: Any, blocksize: int, out: Any) -> None:
    table = np.empty(16, np.float32)
    for block in range((out.size + blocksize - 1) // blocksize):
        for k in range(16):
            table[k] = quant_map[k] * absmax[block]
        start = block * blocksize
        stop = min(start + blocksize, out.size)
        for i in range(start >> 1, stop >> 1):
            out[2 * i] = table[packed[i] >> 4]
            out[2 * i + 1] = table[packed[i] & 15]
        if stop & 1:
            out[stop - 1] = table[packed[stop >> 1] >> 4]


@_compiled(inline=True)
def _bits_bf16(value: Any) -> Any:
    bits = _bits(value)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_compiled(inline=True)
def _bits_f16(value: Any) -> Any:
    bits = _bits(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    if value != value:
        return np.uint16(sign | np.uint32(0x7E00))
    half = abs(_half(value))
    if half >= np.float32(65536):
        return np.uint16(sign | np.uint32(0x7C00))
    # The exact inverse of moving float16's fields into a float32 and correcting the bias.
    return np.uint16(sign | (_bits(half * np.float32(2.0**-112)) >> np.uint32(13)))


@_compiled(types.void(_U8_IN, _F32_IN, _F32_IN, types.int64, types.boolean, _U16))
def _dequantize_4bit_16(packed: Any, absmax: Any, quant_map: Any, blocksize: int, bf16: Any, out: Any) -> None:
    table = np.empty(16, np.uint16)
    for block in range((out.size + blocksize - 1) // blocksize):
        for k in range(16):
            value = quant_map[k] * absmax[block]
            table[k] = _bits_bf16(value) if bf16 else _bits_f16(value)
        start = block * blocksize
        stop = min(start + blocksize, out.size)
        for i in range(start >> 1, stop >> 1):
            out[2 * i] = table[packed[i] >> 4]
            out[2 * i + 1] = table[packed[i] & 15]
        if stop & 1:
            out[stop - 1] = table[packed[stop >> 1] >> 4]


@_compiled(types.void(_I8_IN, _F32_IN, types.int64, _F32))
def _dequantize_int8_f32(weight: Any, scb: Any, cols: int, out: Any) -> None:
    for row in range(scb.size):
        for i in range(row * cols, (row + 1) * cols):
            out[i] = np.float32(weight[i]) * scb[row] * np.float32(7.874015718698502e-3)


@_compiled(types.void(_I8_IN, _F32_IN, types.int64, types.boolean, _U16))
def _dequantize_int8_16(weight: Any, scb: Any, cols: int, bf16: Any, out: Any) -> None:
    table = np.empty(256, np.uint16)
    for row in range(scb.size):
        for k in range(256):
            value = np.float32(np.int8(k)) * scb[row] * np.float32(7.874015718698502e-3)
            table[k] = _bits_bf16(value) if bf16 else _bits_f16(value)
        for i in range(row * cols, (row + 1) * cols):
            out[i] = table[np.uint8(weight[i])]


@_compiled(types.void(_F32_IN, _U8_IN, types.int64, _U8, _F32))
def _quantize_blockwise(values: Any, codes: Any, blocksize: int, out: Any, absmax: Any) -> None:
    """Dynamic 8-bit quantization of finite float32 values, as cpu_ops.cpp does it."""
    for block in range(absmax.size):
        start = block * blocksize
        stop = min(start + blocksize, values.size)
        top = np.float32(0)
        for i in range(start, stop):
            top = max(top, abs(values[i]))
        absmax[block] = top
        if top == 0:
            out[start:stop] = 0
            continue
        inverse = np.float32(1) / top
        for i in range(start, stop):
            x = min(max(values[i] * inverse, np.float32(-1)), np.float32(1))
            half = (x + np.float32(1)) * np.float32(0.5)
            # A fused multiply-add in the library: exact in float64, then rounded once.
            out[i] = codes[int(np.float32(np.float64(half) * 65535.0 + 0.5))]


@_compiled(_SUMS(_F32_IN, _F32_IN))
def _error_sums(original: Any, dequantized: Any) -> tuple[float, float, float]:
    squares, total, largest = 0.0, 0.0, 0.0
    for i in range(original.size):
        x = np.float64(original[i])
        difference = np.float64(dequantized[i]) - x
        squares += difference * difference
        total += x * x
        largest = max(largest, abs(difference))
    return squares, total, largest


def quantize_4bit(values: _Array, dtype: str, quant_type: str, packed: _Array, absmax: _Array) -> tuple[int, int]:
    blocks = values.size // 64
    whole = values[: blocks * 64]
    bounds, order = quant_maps.bounds(quant_type), quant_maps.order(quant_type)
    if dtype == "F32":
        count, first = _quantize_4bit_32(whole, bounds, order, packed, absmax)
    else:
        infinity, magnitudes = quant_maps.infinity_bits(dtype), quant_maps.magnitudes(dtype)
        cuts = quant_maps.cut_points(quant_type, dtype)
        count, first = _quantize_4bit_16(whole, infinity, magnitudes, cuts, order, packed, absmax)
    if blocks * 64 < values.size:
        tail = values[blocks * 64 :]
        tail = tail if dtype == "F32" else quant_maps.widen(tail, dtype)
        _quantize_4bit_tail(tail, bounds, order, packed[blocks * 32 :], absmax[blocks:])
        bad = np.flatnonzero(~np.isfinite(tail))
        count += bad.size
        if bad.size and first < 0:
            first = blocks * 64 + int(bad[0])
    return count, first


def quantize_int8(values: _Array, dtype: str, weight: _Array, scb: _Array) -> tuple[int, int]:
    cols = values.shape[1]
    values, weight = values.reshape(-1), weight.reshape(-1)
    if dtype == "F32":
        return _quantize_int8_f32(values, cols, weight, scb)
    if dtype == "F16":
        return _quantize_int8_f16(values, cols, quant_maps.magnitudes(dtype), weight, scb)
    return _quantize_int8_bf16(values, cols, weight, scb)


def dequantize_4bit(packed: _Array, absmax: _Array, quant_type: str, blocksize: int, dtype: str, out: _Array) -> None:
    quant_map = quant_maps.QUANT_MAPS[quant_type]
    if dtype == "F32":
        _dequantize_4bit_f32(packed, absmax, quant_map, blocksize, out)
    else:
        _dequantize_4bit_16(packed, absmax, quant_map, blocksize, dtype == "BF16", out)


def dequantize_int8(weight: _Array, scb: _Array, dtype: str, out: _Array) -> None:
    cols = weight.shape[1]
    if dtype == "F32":
        _dequantize_int8_f32(weight.reshape(-1), scb, cols, out.reshape(-1))
    else:
        _dequantize_int8_16(weight.reshape(-1), scb, cols, dtype == "BF16", out.reshape(-1))


def quantize_blockwise(values: _Array, blocksize: int, out: _Array, absmax: _Array) -> None:
    _quantize_blockwise(values, quant_maps.nested_codes(), blocksize, out, absmax)


def error_sums(original: _Array, dtype: str, dequantized: _Array) -> tuple[float, float, float]:
    return _error_sums(original if dtype == "F32" else quant_maps.widen(original, dtype), dequantized)
