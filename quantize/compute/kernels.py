"""The arithmetic of bitsandbytes' 4-bit and 8-bit types on CPU, bit for bit, over caller-owned numpy buffers.

Reference: bitsandbytes 0.50.2, ``torch.ops.bitsandbytes.quantize_4bit`` and friends on CPU, and ``bnb.nn.Int8Params``
for int8. The loops are numba's (``numba_kernels``); those that make 4 bits of 16 need LLVM alone (``block_kernels``);
where neither works they are torch's (``torch_kernels``): the same bytes, but slower. Every function may be called from
many threads; none needs threads of its own, all release the GIL.

Dtypes are safetensors' names. Values of "BF16" and "F16" travel as their bits in uint16 arrays, "F32" as float32.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qz.quantize.compute.backends import backend, block_backend, has_numba
from qz.quantize.compute.once import once
from qz.quantize.methods import BLOCK_SIZE, NESTED_BLOCK_SIZE, QuantType

Array = npt.NDArray[Any]

_BITS: Final = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class NonFinite:
    """How many NaN or infinite values there are, and the flat index of the first, -1 if there is none."""

    count: int
    first: int


def quantize_4bit(values: Array, dtype: str, quant_type: QuantType, packed: Array, absmax: Array) -> NonFinite:
    """Quantize in blocks of 64, like ``torch.ops.bitsandbytes.quantize_4bit`` on CPU, to the last bit.

    ``values``: 1-D of any length n; only the end of a tensor may leave a block short, for a short block is scaled by a
    division instead of a reciprocal. ``packed``: uint8[ceil(n / 2)], high nibble first. ``absmax``: float32
    [ceil(n / 64)]. Blocks with non-finite values come out as bitsandbytes makes them, too; they are counted.
    """
    n = values.size
    _check(values, (n,), _BITS[dtype], "values")
    _check(packed, (-(-n // 2),), np.uint8, "packed")
    _check(absmax, (-(-n // BLOCK_SIZE),), np.float32, "absmax")
    module = backend() if dtype == "F32" else block_backend()
    count, first = module.quantize_4bit(values, dtype, quant_type, packed, absmax)
    if count:
        _requantize_4bit(values, dtype, quant_type, packed, absmax)
    return NonFinite(count, first)


def quantize_4bit_as_cuda(values: Array, dtype: str, quant_type: QuantType, packed: Array, absmax: Array) -> NonFinite:
    """``quantize_4bit`` with the bytes of bitsandbytes' CUDA kernels, of "BF16" or "F16"; see ``cuda_tables``.

    Where ``follows_cuda``. Blocks with non-finite values are counted; what is written of them is meaningless.
    """
    _check(values, (values.size,), np.uint16, "values")
    _check(packed, (-(-values.size // 2),), np.uint8, "packed")
    _check(absmax, (-(-values.size // BLOCK_SIZE),), np.float32, "absmax")
    return NonFinite(*block_backend().quantize_4bit_as_cuda(values, dtype, quant_type, packed, absmax))


def _requantize_4bit(values: Array, dtype: str, quant_type: str, packed: Array, absmax: Array) -> None:
    """The blocks with non-finite values once more, by the torch operations, whose NaN rules are the reference's."""
    from qz.quantize.compute.gpu import torch_kernels

    whole = values.size // BLOCK_SIZE
    grouped = values[: whole * BLOCK_SIZE].reshape(whole, BLOCK_SIZE)
    bad = np.flatnonzero(~np.isfinite(absmax[:whole]))
    for start in range(0, bad.size, 1024):
        blocks = bad[start : start + 1024]
        codes, scales = np.empty(blocks.size * 32, np.uint8), np.empty(blocks.size, np.float32)
        torch_kernels.quantize_4bit(grouped[blocks].reshape(-1), dtype, quant_type, codes, scales)
        packed[: whole * 32].reshape(whole, 32)[blocks] = codes.reshape(-1, 32)
        absmax[blocks] = scales
    tail = values[whole * BLOCK_SIZE :]
    if tail.size:
        torch_kernels.quantize_4bit(tail, dtype, quant_type, packed[whole * 32 :], absmax[whole:])


def search_4bit(
    values: Array,
    dtype: str,
    quant_type: QuantType,
    weights: Array | None,
    column: int,
    packed: Array,
    absmax: Array,
) -> NonFinite:
    """``quantize_4bit``, then better scales and codes for the blocks that have them; see ``scale_search``.

    ``absmax``: the scales, of either sign. ``weights``: ``scale_search.tiled_weights`` of the inputs' importance, or
    None; the first of ``values`` lies in ``column`` of its row. Blocks with non-finite values, or with none but zeros,
    are those of ``quantize_4bit``.
    """
    found = quantize_4bit(values, dtype, quant_type, packed, absmax)
    if weights is not None:
        _check(weights, (weights.size,), np.float32, "weights")
    backend().search_4bit(values, dtype, quant_type, weights, column, packed, absmax)
    return found


def encode_4bit(values: Array, dtype: str, quant_type: QuantType, scales: Array, packed: Array) -> None:
    """``packed`` = the codes of the levels nearest to ``values`` under given ``scales``, which may be negative.

    What is finite comes out right under any scale: one of zero, or next to it, gives the code of zero.
    """
    n = values.size
    _check(values, (n,), _BITS[dtype], "values")
    _check(scales, (-(-n // BLOCK_SIZE),), np.float32, "scales")
    _check(packed, (-(-n // 2),), np.uint8, "packed")
    backend().encode_4bit(values, dtype, quant_type, scales, packed)


def gptq_4bit(values: Array, dtype: str, quant_type: QuantType, scales: Array, hessian: Array, packed: Array) -> None:
    """``encode_4bit`` of a whole weight, (out, in), so that errors cancel in its output; see ``gptq``.

    ``hessian``: float32 (in, in). One weight at a time, by all of torch's threads; what they add up in
    another order on another machine may decide a code.
    """
    rows, columns = values.shape
    _check(values, (rows, columns), _BITS[dtype], "values")
    _check(scales, (-(-values.size // BLOCK_SIZE),), np.float32, "scales")
    _check(hessian, (columns, columns), np.float32, "hessian")
    _check(packed, (-(-values.size // 2),), np.uint8, "packed")
    import torch

    from qz.quantize.compute.gpu import gptq, torch_kernels, torch_search

    with _one_gptq:
        factor = _factors().of(hessian, torch.device("cpu"))
        codes = gptq.codes(torch_kernels.tensor(values, dtype), quant_type, torch.from_numpy(scales), factor).view(-1)
    packed[:] = torch_search.packed_codes(codes, quant_type).numpy()


def quantize_int8(values: Array, dtype: str, weight: Array, scb: Array) -> NonFinite:
    """Quantize row by row, like ``bnb.nn.Int8Params(values).to("cpu")``: cast to float16, then scale by its absmax.

    ``values``: (rows, cols). ``weight``: int8 (rows, cols). ``scb``: float32[rows], the rows' absmax. What is not
    finite *after* the cast to float16 is counted, so a bfloat16 beyond 65,504 counts. Scale: fl(fl(1 / absmax) * 127).
    The bytes are the reference's but for the payload of a NaN in ``scb``, which torch's cast varies with its position.
    """
    rows, cols = values.shape
    _check(values, (rows, cols), _BITS[dtype], "values")
    _check(weight, (rows, cols), np.int8, "weight")
    _check(scb, (rows,), np.float32, "scb")
    if not values.size:
        raise ValueError(f"quantize_int8 needs at least one row and one column, got {values.shape}")
    count, first = backend().quantize_int8(values, dtype, weight, scb)
    if count:
        _requantize_int8(values, dtype, weight, scb)
    return NonFinite(count, first)


def quantize_int8_as_cuda(values: Array, dtype: str, weight: Array, scb: Array) -> NonFinite:
    """``quantize_int8`` with the bytes of bitsandbytes' CUDA kernels, on the terms of ``quantize_4bit_as_cuda``."""
    rows, cols = values.shape
    _check(values, (rows, cols), _BITS[dtype], "values")
    _check(weight, (rows, cols), np.int8, "weight")
    _check(scb, (rows,), np.float32, "scb")
    return NonFinite(*backend().quantize_int8_as_cuda(values, dtype, weight, scb))


def _requantize_int8(values: Array, dtype: str, weight: Array, scb: Array) -> None:
    """The rows with non-finite values once more, by the torch operations."""
    from qz.quantize.compute.gpu import torch_kernels

    bad = np.flatnonzero(~(scb < np.float32(65536)))
    step = max(1, 65536 // values.shape[1])
    for start in range(0, bad.size, step):
        rows = bad[start : start + step]
        codes, scales = np.empty((rows.size, values.shape[1]), np.int8), np.empty(rows.size, np.float32)
        torch_kernels.quantize_int8(values[rows], dtype, codes, scales)
        weight[rows], scb[rows] = codes, scales


def dequantize_4bit(
    packed: Array, absmax: Array, quant_type: QuantType, blocksize: int, dtype: str, out: Array
) -> None:
    """``out`` = quant map × absmax, in float32, then rounded to ``dtype``: the same bits on every CPU.

    ``out``: 1-D of n values. ``packed``: uint8[ceil(n / 2)]. ``absmax``: float32[ceil(n / blocksize)], by flat blocks.
    bitsandbytes 0.50.2 has three ways on CPUs: AVX-512, portable C++, and torch (odd rows; with AVX-512 also blocks of
    2,048 and more). qz equals all of them to the last bit, except for:

    - FP4's code 8, its second zero: portable C++ makes -0.0 of it, the others +0.0. qz takes +0.0, which the quant map
      has, so that a file depends neither on the CPU nor on the length of a row.
    - AVX-512 where it is wrong: it takes absmax row by row, which is another block if the row length is no multiple of
      the block size, and it flushes bfloat16 subnormals to zero.
    """
    n = out.size
    _check(out, (n,), _BITS[dtype], "out")
    _check(packed, (-(-n // 2),), np.uint8, "packed")
    _check(absmax, (-(-n // blocksize),), np.float32, "absmax")
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"invalid block size {blocksize}")
    backend().dequantize_4bit(packed, absmax, quant_type, blocksize, dtype, out)


def dequantize_int8(weight: Array, scb: Array, dtype: str, out: Array) -> None:
    """``out`` = fl(fl(weight × SCB) × fl(1 / 127)) in float32, then rounded to ``dtype``: int8_vectorwise_dequant.

    ``weight``: int8 (rows, cols). ``scb``: float32[rows]. ``out``: (rows, cols).
    """
    rows, cols = weight.shape
    _check(weight, (rows, cols), np.int8, "weight")
    _check(scb, (rows,), np.float32, "scb")
    _check(out, (rows, cols), _BITS[dtype], "out")
    backend().dequantize_int8(weight, scb, dtype, out)


_one_thread = threading.Lock()
_one_gptq = threading.Lock()


@once
def _factors() -> Any:
    from qz.quantize.compute.gpu.gptq import Factors

    return Factors()


def quantize_absmax(absmax: Array) -> tuple[Array, Array, float]:
    """Double quantization: uint8[n] absmax, float32[ceil(n / 256)] nested absmax, and the offset that was subtracted.

    ``functional.quantize_4bit(compress_statistics=True)`` in 0.50.2. The offset is ``torch.mean`` on one thread: with
    several, torch's sum of more than 32,768 values, and so the bytes, would depend on their number.
    """
    import torch

    from qz.quantize.compute.gpu import torch_kernels

    n = absmax.size
    _check(absmax, (n,), np.float32, "absmax")
    with _one_thread:
        threads = torch.get_num_threads()
        if threads > 1:  # setting it again may fail in a fork of a process that had threads
            torch.set_num_threads(1)
        try:
            offset = torch_kernels.mean(absmax)
        finally:
            if threads > 1:
                torch.set_num_threads(threads)
    with np.errstate(invalid="ignore"):
        centred = absmax - offset
    if not np.isfinite(centred).all():
        import bitsandbytes.functional

        out, state = bitsandbytes.functional.quantize_blockwise(torch.from_numpy(centred), blocksize=NESTED_BLOCK_SIZE)
        return out.numpy(), state.absmax.numpy(), float(offset)
    quantized = np.empty(n, np.uint8)
    nested = np.empty(-(-n // NESTED_BLOCK_SIZE), np.float32)
    backend().quantize_blockwise(centred, NESTED_BLOCK_SIZE, quantized, nested)
    return quantized, nested, float(offset)


def dequantize_absmax(
    absmax: Array, nested_absmax: Array, nested_quant_map: Array, offset: float, nested_blocksize: int
) -> Array:
    """The float32[n] absmax of a double-quantized tensor: map[absmax] × nested absmax of its block, + offset."""
    n = absmax.size
    _check(absmax, (n,), np.uint8, "absmax")
    _check(nested_absmax, (-(-n // nested_blocksize),), np.float32, "nested_absmax")
    _check(nested_quant_map, (256,), np.float32, "nested_quant_map")
    values: npt.NDArray[np.float32] = nested_quant_map[absmax]
    values *= np.repeat(nested_absmax, nested_blocksize)[:n]
    values += np.float32(offset)
    return values


def cast(values: Array, source_dtype: str, target_dtype: str, out: Array) -> None:
    """``out`` = ``values`` converted as ``torch.Tensor.to`` does; both 1-D, of "F32", "F16" or "BF16"."""
    _check(values, (values.size,), _BITS[source_dtype], "values")
    _check(out, (values.size,), _BITS[target_dtype], "out")
    if source_dtype == target_dtype:
        np.copyto(out, values)
        return
    backend().cast(values, source_dtype, target_dtype, out)


def dequantize_blocks(kind: str, rows: Array, out: Array) -> bool:
    """``out``, float32 (blocks, values), = ggml's blocks ``rows``, uint8 (blocks, bytes).

    False, with nothing done, for a ``kind`` (ggml's name) that no kernel computes here.
    """
    if not has_numba():
        return False
    from qz.quantize.compute.cpu.ggml_kernels import dequantize_blocks as compiled

    return compiled(kind, rows, out)


def error_sums(
    original: Array, original_dtype: str, dequantized: Array, dequantized_dtype: str = "F32"
) -> tuple[float, float, float]:
    """Sum of squared differences, sum of squared originals, and largest absolute difference, in float64.

    ``original``: 1-D, of ``original_dtype``. ``dequantized``: as many values, of ``dequantized_dtype``. Sums of
    chunks may be added up; their last bits depend on the chunks and the backend. A NaN among ``dequantized`` makes the
    first and last NaN.
    """
    _check(original, (original.size,), _BITS[original_dtype], "original")
    _check(dequantized, (original.size,), _BITS[dequantized_dtype], "dequantized")
    squares, total, largest = backend().error_sums(original, original_dtype, dequantized, dequantized_dtype)
    return float(squares), float(total), float(largest)


def _check(array: Array, shape: tuple[int, ...], dtype: Any, name: str) -> None:
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be a contiguous {np.dtype(dtype)} array of shape {shape}, got {array.dtype} {array.shape}"
        )
