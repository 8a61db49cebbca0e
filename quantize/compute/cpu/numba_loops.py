"""Loops over blocks and rows, compiled by numba, that LLVM turns into vector code: ``numba_kernels`` calls them.

Each is for one dtype, releases the GIL and uses the calling thread only. Arguments are those of ``kernels``; with a
``bf16`` or ``to_bf16``, 16-bit values are of bfloat16 where it is true, and of float16 otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from qz.quantize.compute.cpu import llvm_blocks
from qz.quantize.compute.cpu.jit import array, bits, bits_64, compiled, double_of, float_of, inlined

_NON_FINITE = types.UniTuple(types.int64, 2)
_SUMS = types.UniTuple(types.float64, 3)
_U8, _I8, _U16, _F32 = array(types.uint8), array(types.int8), array(types.uint16), array(types.float32)
_U8_OUT, _U16_OUT, _F32_OUT = (array(dtype, output=True) for dtype in (types.uint8, types.uint16, types.float32))


@inlined
def _half(value: Any) -> Any:
    """``value`` rounded to float16, to nearest even, as float32; magnitudes that overflow become >= 65536."""
    raw = bits(value)
    rounded = float_of((raw + np.uint32(0xFFF) + ((raw >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000))
    # Below 2^-14 float16 has a fixed step of 2^-24, which is the last place of float32 numbers in [0.5, 1).
    small = (value + np.float32(0.75)) - np.float32(0.75)
    return small if abs(value) < np.float32(2.0**-14) else rounded


@inlined
def _of_bf16(raw: Any) -> Any:
    return float_of(np.uint32(raw) << np.uint32(16))


@inlined
def _of_f16(raw: Any) -> Any:
    """Fields moved into place, then the exponent's bias corrected by an exact multiplication."""
    fields = np.uint32((np.uint32(raw) & np.uint32(0x7FFF)) << np.uint32(13))
    finite = bits(float_of(fields) * np.float32(2.0**112))
    magnitude = finite if fields < np.uint32(0x0F800000) else np.uint32(fields | np.uint32(0x7F800000))
    return float_of(magnitude | ((np.uint32(raw) & np.uint32(0x8000)) << np.uint32(16)))


@inlined
def _to_bf16(value: Any) -> Any:
    raw = bits(value)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FC0)


@inlined
def _to_f16(value: Any) -> Any:
    sign = np.uint32((bits(value) >> np.uint32(16)) & np.uint32(0x8000))
    # The inverse of _of_f16; what overflows reaches infinity's bits or beyond.
    magnitude = min(np.uint32(bits(abs(_half(value)) * np.float32(2.0**-112)) >> np.uint32(13)), np.uint32(0x7C00))
    return np.uint16(sign | (magnitude if value == value else np.uint32(0x7E00)))


@inlined
def _byte(value: Any) -> Any:
    """Round half to even of a float32 in [-128, 127], as int8: the sum's last place is 1, its low byte the integer."""
    return np.int8(bits(value + np.float32(12582912)))


@inlined
def _scale(absmax: Any, steps: Any) -> Any:
    """127 / absmax as torch computes it. A row of zeros gives NaN there, which becomes 0 as an int8.

    ``steps``: what the reciprocal is off by, as in ``cuda_tables.reciprocal_steps``.
    """
    step = np.uint32(np.int32(steps[(bits(absmax) >> np.uint32(13)) & np.uint32(1023)]))
    return float_of(bits(np.float32(1) / absmax) + step) * np.float32(127) if absmax > 0 else np.float32(0)


# In the loops over i, arrays are rows or slices: an index that may be negative would keep LLVM from making vectors.
#
# int8: ``steps`` int8[1024] is what reciprocals are off by, see ``_scale``; ``magnitudes`` float32[32768] the values of
# float16 by their bits. Returned are the count and the first flat index of what is not finite in float16.


@compiled(_NON_FINITE(array(types.uint16, 2), _I8, array(types.int8, 2, output=True), _F32_OUT))
def quantize_int8_bf16(values: Any, steps: Any, weight: Any, scb: Any) -> tuple[int, int]:
    count, first = 0, -1
    rows, cols = values.shape
    for row in range(rows):
        source, target = values[row], weight[row]
        top = np.uint16(0)
        for i in range(cols):
            top = max(top, np.uint16(source[i] & np.uint16(0x7FFF)))
        scb[row] = _half(_of_bf16(top))
        if not scb[row] < np.float32(65536):
            for i in range(cols):
                if not abs(_half(_of_bf16(source[i]))) < np.float32(65536):
                    count += 1
                    if first < 0:
                        first = row * cols + i
        scale = _scale(scb[row], steps)
        for i in range(cols):
            target[i] = _byte(_half(_of_bf16(source[i])) * scale)
    return count, first


@compiled(_NON_FINITE(array(types.uint16, 2), _F32, _I8, array(types.int8, 2, output=True), _F32_OUT))
def quantize_int8_f16(values: Any, magnitudes: Any, steps: Any, weight: Any, scb: Any) -> tuple[int, int]:
    count, first = 0, -1
    rows, cols = values.shape
    for row in range(rows):
        source, target = values[row], weight[row]
        top = np.uint16(0)
        for i in range(cols):
            top = max(top, np.uint16(source[i] & np.uint16(0x7FFF)))
        scb[row] = magnitudes[top]
        if top >= np.uint16(0x7C00):
            for i in range(cols):
                if np.uint16(source[i] & np.uint16(0x7FFF)) >= np.uint16(0x7C00):
                    count += 1
                    if first < 0:
                        first = row * cols + i
        scale = _scale(scb[row], steps)
        for i in range(cols):
            target[i] = _byte(_of_f16(source[i]) * scale)
    return count, first


@compiled(_NON_FINITE(array(types.float32, 2), _I8, array(types.int8, 2, output=True), _F32_OUT))
def quantize_int8_f32(values: Any, steps: Any, weight: Any, scb: Any) -> tuple[int, int]:
    count, first = 0, -1
    rows, cols = values.shape
    for row in range(rows):
        source, target = values[row], weight[row]
        top = np.uint32(0)
        for i in range(cols):
            top = max(top, np.uint32(bits(source[i]) & np.uint32(0x7FFFFFFF)))
        scb[row] = _half(float_of(top))
        if not scb[row] < np.float32(65536):
            for i in range(cols):
                if not abs(_half(source[i])) < np.float32(65536):
                    count += 1
                    if first < 0:
                        first = row * cols + i
        scale = _scale(scb[row], steps)
        for i in range(cols):
            target[i] = _byte(_half(source[i]) * scale)
    return count, first


@compiled(types.void(_U8, _F32, types.boolean, _F32, types.int64, _F32_OUT))
def dequantize_4bit_f32(packed: Any, absmax: Any, nf4: Any, quant_map: Any, blocksize: int, out: Any) -> None:
    llvm_blocks.dequantize(packed, absmax, nf4, quant_map, blocksize, out)


@compiled(types.void(_U8, _F32, types.boolean, _F32, types.int64, types.boolean, _U16_OUT))
def dequantize_4bit_16(packed: Any, absmax: Any, nf4: Any, quant_map: Any, blocksize: int, bf16: Any, out: Any) -> None:
    values = np.empty(4096, np.float32)  # stays in the first-level cache; no block size is larger
    for start in range(0, out.size, 4096):
        target = out[start : start + 4096]
        size = target.size
        first = start // blocksize
        llvm_blocks.dequantize(
            packed[start // 2 :],
            absmax[first : first + -(-size // blocksize)],
            nf4,
            quant_map,
            blocksize,
            values[:size],
        )
        if bf16:
            for i in range(size):
                target[i] = _to_bf16(values[i])
        else:
            for i in range(size):
                target[i] = _to_f16(values[i])


@inlined
def _product(weight: Any, scb: Any) -> Any:
    return np.float32(weight) * scb * np.float32(7.874015718698502e-3)


@compiled(types.void(array(types.int8, 2), _F32, array(types.float32, 2, output=True)))
def dequantize_int8_f32(weight: Any, scb: Any, out: Any) -> None:
    for row in range(scb.size):
        source, target, scale = weight[row], out[row], scb[row]
        for i in range(source.size):
            target[i] = _product(source[i], scale)


@compiled(types.void(array(types.int8, 2), _F32, types.boolean, array(types.uint16, 2, output=True)))
def dequantize_int8_16(weight: Any, scb: Any, bf16: Any, out: Any) -> None:
    for row in range(scb.size):
        source, target, scale = weight[row], out[row], scb[row]
        if bf16:
            for i in range(source.size):
                target[i] = _to_bf16(_product(source[i], scale))
        else:
            for i in range(source.size):
                target[i] = _to_f16(_product(source[i], scale))


@compiled(types.void(_F32, _U8, types.int64, _U8_OUT, _F32_OUT))
def quantize_blockwise(values: Any, codes: Any, blocksize: int, out: Any, absmax: Any) -> None:
    """Dynamic 8-bit quantization of finite values, as cpu_ops.cpp does it."""
    for block in range(absmax.size):
        source = values[block * blocksize : (block + 1) * blocksize]
        target = out[block * blocksize : (block + 1) * blocksize]
        top = np.float32(0)
        for i in range(source.size):
            top = max(top, abs(source[i]))
        absmax[block] = top
        if top == 0:
            target[:] = 0
            continue
        inverse = np.float32(1) / top
        for i in range(source.size):
            x = min(max(source[i] * inverse, np.float32(-1)), np.float32(1))
            half = (x + np.float32(1)) * np.float32(0.5)
            # A fused multiply-add in the library: exact in float64, then rounded once.
            target[i] = codes[int(np.float32(np.float64(half) * 65535.0 + 0.5))]


@compiled(types.boolean(array(types.uint16), types.boolean, _U16_OUT))
def cast_16(values: Any, to_bf16: Any, out: Any) -> bool:
    """ "F16" to "BF16" or back. False if there is a NaN, whose bits are not right then."""
    nan = 0
    if to_bf16:
        for i in range(values.size):
            x = _of_f16(values[i])
            nan |= x != x
            out[i] = _to_bf16(x)
    else:
        for i in range(values.size):
            x = _of_bf16(values[i])
            nan |= x != x
            out[i] = _to_f16(x)
    return nan == 0


@compiled(types.void(_U16, types.boolean, _F32_OUT))
def widen_16(values: Any, bf16: Any, out: Any) -> None:
    if bf16:
        for i in range(values.size):
            out[i] = _of_bf16(values[i])
    else:
        for i in range(values.size):
            out[i] = _of_f16(values[i])


@inlined
def _plus_error(sums: Any, original: Any, dequantized: Any) -> Any:
    """``sums`` and one pair of values more: squared differences, squared originals, the largest difference's bits.

    Magnitudes are compared as integers, which LLVM turns into vector code: their bits have the same order, with NaN
    above all.
    """
    squares, total, largest = sums
    x = np.float64(original)
    difference = np.float64(dequantized) - x
    return squares + difference * difference, total + x * x, max(largest, bits_64(abs(difference)))


@compiled(_SUMS(_F32, _F32), fastmath={"reassoc"})
def error_sums_f32(original: Any, dequantized: Any) -> tuple[float, float, float]:
    sums = 0.0, 0.0, np.int64(0)
    for i in range(original.size):
        sums = _plus_error(sums, original[i], dequantized[i])
    return sums[0], sums[1], double_of(sums[2])


@compiled(_SUMS(_U16, _U16), fastmath={"reassoc"})
def error_sums_bf16(original: Any, dequantized: Any) -> tuple[float, float, float]:
    sums = 0.0, 0.0, np.int64(0)
    for i in range(original.size):
        sums = _plus_error(sums, _of_bf16(original[i]), _of_bf16(dequantized[i]))
    return sums[0], sums[1], double_of(sums[2])


@compiled(_SUMS(_U16, _U16), fastmath={"reassoc"})
def error_sums_f16(original: Any, dequantized: Any) -> tuple[float, float, float]:
    sums = 0.0, 0.0, np.int64(0)
    for i in range(original.size):
        sums = _plus_error(sums, _of_f16(original[i]), _of_f16(dequantized[i]))
    return sums[0], sums[1], double_of(sums[2])
