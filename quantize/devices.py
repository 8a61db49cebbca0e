"""Where the arithmetic runs: the CPU's own kernels here, bitsandbytes' operations on an accelerator."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qz import UsageError
from qz.quantize import kernels
from qz.quantize.kernels import NonFinite

CHUNK_BYTES = 4 << 20
"""Source bytes a CPU thread works on at a time: small enough to stay in its cache."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """``qz.quantize.kernels`` in the calling thread."""

    name: str = "cpu"
    chunk_bytes: int = CHUNK_BYTES

    @property
    def threads(self) -> int:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def cast(self, values: NDArray[Any], source: str, target: str, out: NDArray[Any]) -> None:
        kernels.cast(values, source, target, out)

    def quantize_4bit(
        self, values: NDArray[Any], dtype: str, quant_type: str, packed: NDArray[np.uint8], absmax: NDArray[np.float32]
    ) -> NonFinite:
        return kernels.quantize_4bit(values, dtype, quant_type, packed, absmax)

    def quantize_int8(
        self, values: NDArray[Any], dtype: str, weight: NDArray[np.int8], scb: NDArray[np.float32]
    ) -> NonFinite:
        return kernels.quantize_int8(values, dtype, weight, scb)

    def quantize_absmax(self, absmax: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]:
        return kernels.quantize_absmax(absmax)


def arithmetic_on(device: str) -> Cpu:
    """The arithmetic of a ``--device``: ``auto``, ``cpu``, ``cuda[:N]``, ``xpu`` or ``mps``."""
    if device in ("auto", "cpu"):
        return Cpu()
    raise UsageError(f"--device {device} is not available here. Use --device cpu.")
