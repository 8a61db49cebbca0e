"""The kernels in torch, for where numba cannot be imported, and for the rare blocks with non-finite values.

The same operations, in the same order, as bitsandbytes 0.50.2's CPU path (backends/default/ops.py), in chunks that
bound the temporaries to a few MB. ``kernels`` documents the arguments and checks them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # noqa: TID253 (this module is imported lazily)

from qz.quantize.compute import tables

_Array = npt.NDArray[Any]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_CHUNK = 65536
"""Values per step: a multiple of every block size, small enough to stay in cache."""


def tensor(values: _Array, dtype: str) -> torch.Tensor:
    """``values`` as a tensor of ``dtype`` on the same memory; a read-only array is copied, for torch knows none."""
    return torch.from_numpy(values if values.flags.writeable else values.copy()).view(DTYPES[dtype])


def _non_finite(values: torch.Tensor, start: int, count: int, first: int) -> tuple[int, int]:
    """``count`` and ``first`` after these values, the first of which has the flat index ``start``."""
    bad = ~torch.isfinite(values.reshape(-1))
    found = int(bad.sum())
    if found and first < 0:
        first = start + int(bad.to(torch.uint8).argmax())
    return count + found, first


def quantize_4bit(values: _Array, dtype: str, quant_type: str, packed: _Array, absmax: _Array) -> tuple[int, int]:
    count, first = 0, -1
    bounds = torch.from_numpy(tables.bounds(quant_type))
    order = torch.from_numpy(tables.order(quant_type))
    for start in range(0, values.size, _CHUNK):
        chunk = tensor(values[start : start + _CHUNK], dtype).float()
        count, first = _non_finite(chunk, start, count, first)
        whole = chunk.numel() // 64 * 64
        blocks = chunk[:whole].reshape(-1, 64)
        scales = blocks.abs().max(dim=-1).values if whole else chunk.new_empty(0)
        scaled = (blocks * (1.0 / scales.clamp(min=1e-38).view(-1, 1))).clamp_(-1, 1).reshape(-1)
        if whole < chunk.numel():
            scale = chunk[whole:].abs().max().clamp(min=1e-38)
            scales = torch.cat([scales, scale.unsqueeze(0)])
            scaled = torch.cat([scaled, torch.clamp(chunk[whole:] / scale, -1, 1)])
        if scaled.numel() % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))
        codes = order[torch.bucketize(scaled, bounds, out_int32=True)]
        absmax[start // 64 : start // 64 + scales.numel()] = scales.numpy()
        packed[start // 2 : (start + scaled.numel()) // 2] = ((codes[::2] << 4) | codes[1::2]).numpy()
    return count, first


def search_4bit(
    values: _Array, dtype: str, quant_type: str, weights: _Array | None, column: int, packed: _Array, absmax: _Array
) -> None:
    from qz.quantize.compute.gpu import torch_search

    of_blocks = None if weights is None else torch_search.BlockWeights(tensor(weights, "F32"), column)
    outs = torch.from_numpy(packed), torch.from_numpy(absmax)
    torch_search.improve(tensor(values, dtype), of_blocks, quant_type, *outs)


def encode_4bit(values: _Array, dtype: str, quant_type: str, scales: _Array, packed: _Array) -> None:
    from qz.quantize.compute.gpu import torch_search

    torch_search.encode(tensor(values, dtype), quant_type, tensor(scales, "F32"), torch.from_numpy(packed))


def quantize_int8(values: _Array, dtype: str, weight: _Array, scb: _Array) -> tuple[int, int]:
    count, first = 0, -1
    rows, cols = values.shape
    step = max(1, _CHUNK // max(1, cols))
    for start in range(0, rows, step):
        half = tensor(values[start : start + step].reshape(-1), dtype).to(torch.float16).reshape(-1, cols)
        count, first = _non_finite(half, start * cols, count, first)
        scales = half.abs().max(dim=1).values.float()
        scb[start : start + step] = scales.numpy()
        weight[start : start + step] = torch.round(half * (127.0 / scales.unsqueeze(-1))).to(torch.int8).numpy()
    return count, first


def dequantize_4bit(packed: _Array, absmax: _Array, quant_type: str, blocksize: int, dtype: str, out: _Array) -> None:
    quant_map = torch.from_numpy(tables.QUANT_MAPS[quant_type])
    for start in range(0, out.size, _CHUNK):
        target = tensor(out[start : start + _CHUNK], dtype)
        codes = tensor_u8(packed[start // 2 : (start + _CHUNK) // 2])
        scales = tensor(absmax[start // blocksize : -(-(start + _CHUNK) // blocksize)], "F32")
        values = quant_map[torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)[: target.numel()].long()]
        target.copy_(values * scales.repeat_interleave(blocksize)[: target.numel()])


def tensor_u8(values: _Array) -> torch.Tensor:
    """``values`` (uint8 or int8) as a tensor, without torch's warning about read-only arrays."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def dequantize_int8(weight: _Array, scb: _Array, dtype: str, out: _Array) -> None:
    rows, cols = weight.shape
    step = max(1, _CHUNK // max(1, cols))
    for start in range(0, rows, step):
        scales = tensor(scb[start : start + step], "F32").view(-1, 1)
        values = tensor_u8(weight[start : start + step]) * scales * 7.874015718698502e-3
        tensor(out[start : start + step].reshape(-1), dtype).copy_(values.reshape(-1))


def quantize_blockwise(values: _Array, blocksize: int, out: _Array, absmax: _Array) -> None:
    """Dynamic 8-bit quantization as bitsandbytes' cpu_ops.cpp does it, of finite float32 values."""
    codes = torch.from_numpy(tables.nested_codes())
    for start in range(0, values.size, _CHUNK // blocksize * blocksize or blocksize):
        chunk = tensor(values[start : start + (_CHUNK // blocksize * blocksize or blocksize)], "F32")
        padded = torch.nn.functional.pad(chunk, (0, -chunk.numel() % blocksize)).view(-1, blocksize)
        scales = padded.abs().amax(dim=1)
        half = ((padded * (1.0 / scales).view(-1, 1)).clamp(-1, 1) + 1.0) * 0.5
        # A fused multiply-add in the library: exact in float64, then rounded once.
        steps = (half.double() * 65535.0 + 0.5).float().nan_to_num(0).long()
        quantized = torch.where(scales.view(-1, 1) == 0, 0, codes[steps]).to(torch.uint8)
        out[start : start + chunk.numel()] = quantized.reshape(-1)[: chunk.numel()].numpy()
        absmax[start // blocksize : start // blocksize + scales.numel()] = scales.numpy()


def error_sums(
    original: _Array, original_dtype: str, dequantized: _Array, dequantized_dtype: str
) -> tuple[float, float, float]:
    squares, total, largest = 0.0, 0.0, torch.zeros((), dtype=torch.float64)
    for start in range(0, original.size, _CHUNK):
        reference = tensor(original[start : start + _CHUNK], original_dtype).double()
        difference = tensor(dequantized[start : start + _CHUNK], dequantized_dtype).double() - reference
        squares += float(difference.square().sum())
        total += float(reference.square().sum())
        largest = torch.maximum(largest, difference.abs().max())
    return squares, total, float(largest)


def cast(values: _Array, source_dtype: str, target_dtype: str, out: _Array) -> None:
    """Chunks below torch's grain size of 32,768, so that torch starts no thread of its own."""
    for start in range(0, values.size, _CHUNK // 4):
        source = tensor(values[start : start + _CHUNK // 4], source_dtype)
        tensor(out[start : start + _CHUNK // 4], target_dtype).copy_(source)


def mean(values: _Array) -> np.float32:
    """The float32 mean as torch sums it; it splits more than 32,768 values between its threads."""
    return np.float32(tensor(values, "F32").mean().item())
