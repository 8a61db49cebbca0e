"""An x86-64 CPU without AVX-512, played by one that has it: ``make test CPU=portable``.

torch and numba are told by the environment, in child processes as well. bitsandbytes asks the processor itself, but its
portable C++ serves every row that is no multiple of 16 values: here it gets the same values in rows of two. That is for
this process only, which is enough: on a CPU, the command computes with its own kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
DEQUANTIZE = [
    f"cdequantize_blockwise_cpu_{kind}_{dtype}" for kind in ("fp4", "nf4") for dtype in ("fp32", "bf16", "fp16")
]


def in_rows_of_two(function: Callable[..., Any]) -> Callable[..., Any]:
    import ctypes

    def call(packed: Any, absmax: Any, out: Any, blocksize: Any, rows: Any, columns: Any) -> Any:
        values = rows.value * columns.value
        return function(packed, absmax, out, blocksize, ctypes.c_longlong(values // 2), ctypes.c_longlong(2))

    return call


def pretend() -> None:
    """Before torch or numba is imported."""
    os.environ |= ENVIRONMENT
    from bitsandbytes.cextension import lib

    lib.has_avx512bf16_cpu = lambda: False
    for name in DEQUANTIZE:
        setattr(lib, name, in_rows_of_two(getattr(lib, name)))
