"""Which module computes on CPU: numba's kernels, LLVM's for 4 bit, or torch's where neither works."""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from qz.quantize.compute.once import once

if TYPE_CHECKING:
    from types import ModuleType

_fallen_back: list[str] = []
"""Why numba does not compute, once that is known."""


@once
def backend() -> ModuleType:
    """The module that computes: numba's if that works here, unless ``QZ_KERNELS`` is ``torch``; the same bytes.

    Chosen at the first call of a kernel, because importing numba takes a quarter of a second that a GPU has no use for.
    numba's extension points move from release to release: one block is quantized to see whether they still fit.
    """
    if os.environ.get("QZ_KERNELS") != "torch":
        try:
            module = importlib.import_module("qz.quantize.compute.cpu.numba_kernels")
            module.quantize_4bit(np.zeros(1, np.uint16), "BF16", "nf4", np.empty(1, np.uint8), np.empty(1, np.float32))
        except Exception as error:  # noqa: BLE001 - whatever it is, torch computes the same bytes
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            _fallen_back.append(f"computed by torch, more slowly: numba does not work here ({first_line})")
        else:
            return module
    return importlib.import_module("qz.quantize.compute.gpu.torch_kernels")


@once
def block_backend() -> ModuleType:
    """What quantizes 16-bit values to 4 bit: LLVM's code without numba, whose import would take most of the time.

    ``backend`` where llvmlite is not as it was.
    """
    if os.environ.get("QZ_KERNELS") != "torch":
        with suppress(Exception):  # whatever it is, the others compute the same bytes
            module = importlib.import_module("qz.quantize.compute.cpu.block_kernels")
            module.require_working()
            return module
    return backend()


def follows_cuda(method: str) -> bool:
    """Whether there is a kernel for what CUDA's kernels write."""
    return has_numba() if method == "int8" else hasattr(block_backend(), "quantize_4bit_as_cuda")


def has_numba() -> bool:
    """Whether the backend is numba's."""
    return backend().__name__.rpartition(".")[2] == "numba_kernels"


def notes() -> tuple[str, ...]:
    """What the user should know about the backend, if a kernel has been called."""
    return tuple(_fallen_back)
