"""The kernels by numba: which of the compiled ``numba_loops`` does what, and pieces that fit a cache.

``kernels`` documents the arguments and checks them; here they are trusted. Each kernel releases the GIL and uses the
calling thread only. Blocks and rows with non-finite values are counted, not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qz.quantize.compute import cuda_tables, scale_search, tables
from qz.quantize.compute.cpu import block_kernels, llvm_blocks, llvm_search, numba_loops

_Array = npt.NDArray[Any]


def quantize_4bit(values: _Array, dtype: str, quant_type: str, packed: _Array, absmax: _Array) -> tuple[int, int]:
    if dtype != "F32":
        return block_kernels.quantize_4bit(values, dtype, quant_type, packed, absmax)
    whole = values.size // 64 * 64
    count, first = llvm_blocks.quantize_32(values[:whole], quant_type == "nf4", packed, absmax)
    if whole < values.size:
        tail = values[whole:]
        block_kernels.quantize_tail(tail, quant_type, packed[whole // 2 :], absmax[whole // 64 :])
        bad = np.flatnonzero(~np.isfinite(tail))
        count += bad.size
        if bad.size and first < 0:
            first = whole + int(bad[0])
    return count, first


_ROUNDING = {"F32": 0, "BF16": 1, "F16": 2}
_PIECE = 1 << 15
"""Values at a time: as float32 they stay in the second-level cache."""


def search_4bit(
    values: _Array, dtype: str, quant_type: str, weights: _Array | None, column: int, packed: _Array, absmax: _Array
) -> None:
    function = llvm_search.search[quant_type, weights is not None]
    inverses = np.array(scale_search.inverse_candidates(quant_type), np.float32)
    given = np.zeros(65, np.float32) if weights is None else weights
    for start, piece in _wide_pieces(values, dtype):
        blocks = piece.size // 64
        first = start // 64
        scales, codes = absmax[first : first + blocks], packed[first * 32 : (first + blocks) * 32]
        own = codes if codes.size == blocks * 32 else np.resize(codes, blocks * 32)
        function(piece, given, column + start, inverses, _ROUNDING[dtype], own, scales)
        if own is not codes:
            codes[:] = own[: codes.size]


def encode_4bit(values: _Array, dtype: str, quant_type: str, scales: _Array, packed: _Array) -> None:
    for start, piece in _wide_pieces(values, dtype):
        first, blocks = start // 64, piece.size // 64
        codes = packed[first * 32 : (first + blocks) * 32]
        own = codes if codes.size == blocks * 32 else np.empty(blocks * 32, np.uint8)
        llvm_search.encode[quant_type](piece, scales[first : first + blocks], own)
        if own is not codes:
            codes[:] = own[: codes.size]


def _wide_pieces(values: _Array, dtype: str) -> Iterator[tuple[int, _Array]]:
    """Values as float32, in whole blocks: the end of the last is filled up with zeros. The memory is used again."""
    buffer = np.empty(min(_PIECE, values.size + 63), np.float32)
    for start in range(0, values.size, _PIECE):
        part = values[start : start + _PIECE]
        whole = -(-part.size // 64) * 64
        if dtype == "F32" and whole == part.size:
            yield start, part
            continue
        wide = buffer[:whole]
        wide[part.size :] = 0
        if dtype == "F32":
            wide[: part.size] = part
        else:
            numba_loops.widen_16(part, dtype == "BF16", wide[: part.size])
        yield start, wide


_NO_STEPS = np.zeros(1024, np.int8)


def quantize_int8(values: _Array, dtype: str, weight: _Array, scb: _Array) -> tuple[int, int]:
    return _quantize_int8(values, dtype, _NO_STEPS, weight, scb)


def quantize_int8_as_cuda(values: _Array, dtype: str, weight: _Array, scb: _Array) -> tuple[int, int]:
    return _quantize_int8(values, dtype, cuda_tables.reciprocal_steps(), weight, scb)


def _quantize_int8(values: _Array, dtype: str, steps: _Array, weight: _Array, scb: _Array) -> tuple[int, int]:
    if dtype == "F32":
        return numba_loops.quantize_int8_f32(values, steps, weight, scb)
    if dtype == "F16":
        return numba_loops.quantize_int8_f16(values, tables.magnitudes(dtype), steps, weight, scb)
    return numba_loops.quantize_int8_bf16(values, steps, weight, scb)


def dequantize_4bit(packed: _Array, absmax: _Array, quant_type: str, blocksize: int, dtype: str, out: _Array) -> None:
    nf4, quant_map = quant_type == "nf4", tables.QUANT_MAPS[quant_type]
    if dtype == "F32":
        numba_loops.dequantize_4bit_f32(packed, absmax, nf4, quant_map, blocksize, out)
    else:
        numba_loops.dequantize_4bit_16(packed, absmax, nf4, quant_map, blocksize, dtype == "BF16", out)


def dequantize_int8(weight: _Array, scb: _Array, dtype: str, out: _Array) -> None:
    if dtype == "F32":
        numba_loops.dequantize_int8_f32(weight, scb, out)
    else:
        numba_loops.dequantize_int8_16(weight, scb, dtype == "BF16", out)


def quantize_blockwise(values: _Array, blocksize: int, out: _Array, absmax: _Array) -> None:
    numba_loops.quantize_blockwise(values, tables.nested_codes(), blocksize, out, absmax)


def cast(values: _Array, source_dtype: str, target_dtype: str, out: _Array) -> None:
    # torch is as fast as this for float32, and alone knows which NaN it makes of a NaN.
    if "F32" in (source_dtype, target_dtype) or not numba_loops.cast_16(values, target_dtype == "BF16", out):
        from qz.quantize.compute.gpu import torch_kernels

        torch_kernels.cast(values, source_dtype, target_dtype, out)


def error_sums(
    original: _Array, original_dtype: str, dequantized: _Array, dequantized_dtype: str
) -> tuple[float, float, float]:
    if original_dtype == dequantized_dtype == "BF16":
        return numba_loops.error_sums_bf16(original, dequantized)
    if original_dtype == dequantized_dtype == "F16":
        return numba_loops.error_sums_f16(original, dequantized)
    return numba_loops.error_sums_f32(_wide(original, original_dtype), _wide(dequantized, dequantized_dtype))


def _wide(values: _Array, dtype: str) -> _Array:
    return values if dtype == "F32" else tables.widen(values, dtype)
