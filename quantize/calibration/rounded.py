"""A weight as a quantized checkpoint gives it back, computed by qz's own kernels."""

from __future__ import annotations

import numpy as np
import torch

from qz.quantize.compute import kernels
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.methods import BLOCK_SIZE, FourBit, Method


def rounded(weight: torch.Tensor, method: Method, arithmetic: Arithmetic, *, transposed: bool = False) -> torch.Tensor:
    """``weight`` [out, in], or [in, out] where ``transposed``, quantized by absmax and dequantized, in its own dtype.

    Double quantization is left out: it changes the error by less than a hundredth. Raises MalformedInput for values
    that are not finite.
    """
    values = (weight.T if transposed else weight).float().cpu().contiguous().numpy()
    out, flat = np.empty_like(values), values.reshape(-1)
    if isinstance(method, FourBit):
        packed = np.empty(-(-flat.size // 2), np.uint8)
        absmax = np.empty(-(-flat.size // BLOCK_SIZE), np.float32)
        arithmetic.quantize_4bit(flat, "F32", method.quant_type, packed, absmax)
        kernels.dequantize_4bit(packed, absmax, method.quant_type, BLOCK_SIZE, "F32", out.reshape(-1))
    else:
        codes, scb = np.empty(values.shape, np.int8), np.empty(len(values), np.float32)
        arithmetic.quantize_int8(values, "F32", codes, scb)
        kernels.dequantize_int8(codes, scb, "F32", out)
    found = torch.from_numpy(out).to(weight.device, weight.dtype)
    return found.T.contiguous() if transposed else found
