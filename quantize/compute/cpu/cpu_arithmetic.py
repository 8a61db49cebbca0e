"""The arithmetic of the CPU: this package's own kernels, in the calling thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qz.quantize.compute import kernels
from qz.quantize.compute.cores import usable_cores
from qz.quantize.compute.kernels import NonFinite

if TYPE_CHECKING:
    from qz.quantize.compute.arrays import Bytes
    from qz.quantize.methods import QuantType

CHUNK_BYTES = 4 << 20
"""Source bytes a CPU thread works on at a time: small enough to stay in its cache."""
LARGE_CHUNK_BYTES = 16 << 20
"""The same for many threads, which would wait for each other between their calls: then fewer of these count more."""
MANY_THREADS = 8
MOST_THREADS = 8
"""More of them only wait for each other: FLUX took 5.4 s with 8 threads on 16 cores, 6.3 s with 16."""


def _fitting_chunk() -> int:
    return LARGE_CHUNK_BYTES if usable_cores() >= MANY_THREADS else CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Cpu:
    """``qz.quantize.compute.kernels`` in the calling thread."""

    name: str = "cpu"
    model: str = ""
    bytes_of: str = "cpu"
    """``cuda``: what is quantized from absmax gets the bytes of bitsandbytes' CUDA kernels, see ``cuda_tables``."""
    chunk_bytes: int = field(default_factory=_fitting_chunk)
    notes: tuple[str, ...] = ()
    """What the user should know about the choice of this device."""

    @property
    def threads(self) -> int:
        return min(usable_cores(), MOST_THREADS)

    def buffer(self, nbytes: int) -> Bytes:
        return np.empty(nbytes, np.uint8)

    def cast(self, values: NDArray[Any], source: str, target: str, out: NDArray[Any]) -> None:
        kernels.cast(values, source, target, out)

    def quantize_4bit(
        self, values: NDArray[Any], dtype: str, quant_type: QuantType, packed: Bytes, absmax: NDArray[np.float32]
    ) -> NonFinite:
        quantize = kernels.quantize_4bit if self.bytes_of == "cpu" else kernels.quantize_4bit_as_cuda
        return quantize(values, dtype, quant_type, packed, absmax)

    def search_4bit(
        self,
        values: NDArray[Any],
        dtype: str,
        quant_type: QuantType,
        weights: NDArray[np.float32] | None,
        column: int,
        packed: Bytes,
        absmax: NDArray[np.float32],
    ) -> NonFinite:
        return kernels.search_4bit(values, dtype, quant_type, weights, column, packed, absmax)

    def encode_4bit(
        self, values: NDArray[Any], dtype: str, quant_type: QuantType, scales: NDArray[np.float32], packed: Bytes
    ) -> None:
        kernels.encode_4bit(values, dtype, quant_type, scales, packed)

    def gptq_4bit(
        self,
        values: NDArray[Any],
        dtype: str,
        quant_type: QuantType,
        scales: NDArray[np.float32],
        hessian: NDArray[np.float32],
        packed: Bytes,
    ) -> None:
        kernels.gptq_4bit(values, dtype, quant_type, scales, hessian, packed)

    def quantize_int8(
        self, values: NDArray[Any], dtype: str, weight: NDArray[np.int8], scb: NDArray[np.float32]
    ) -> NonFinite:
        quantize = kernels.quantize_int8 if self.bytes_of == "cpu" else kernels.quantize_int8_as_cuda
        return quantize(values, dtype, weight, scb)

    def quantize_absmax(self, absmax: NDArray[np.float32]) -> tuple[Bytes, NDArray[np.float32], float]:
        return kernels.quantize_absmax(absmax)

    def dequantize_4bit(
        self,
        packed: Bytes,
        absmax: NDArray[np.float32],
        quant_type: QuantType,
        blocksize: int,
        dtype: str,
        out: NDArray[Any],
    ) -> None:
        kernels.dequantize_4bit(packed, absmax, quant_type, blocksize, dtype, out)

    def dequantize_int8(
        self, weight: NDArray[np.int8], scb: NDArray[np.float32], dtype: str, out: NDArray[Any]
    ) -> None:
        kernels.dequantize_int8(weight, scb, dtype, out)
