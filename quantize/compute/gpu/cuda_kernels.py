"""The kernels of ``cuda_source``, compiled by the NVRTC that comes with torch when a device first needs them.

torch has no public name for that yet. Where it cannot compile, eager torch computes the same bits, in longer time.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from functools import cache

import torch  # noqa: TID253 (this module is imported lazily)

from qz.quantize.compute.gpu import cuda_source

_SOURCES = {"search": cuda_source.SEARCH, "gptq": cuda_source.GPTQ}
_compiled: dict[tuple[torch.device, str], ctypes.c_void_p | None] = {}
_compiling = threading.Lock()
_WARPS = 8
"""Of a group of threads."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernel(name: str, device: torch.device) -> ctypes.c_void_p | None:
    """The function to launch on the ``device`` of a tensor, or None where there is none."""
    if device.type != "cuda":
        return None
    with _compiling:
        if (device, name) not in _compiled:
            _compiled[device, name] = _compile(name, device)
        return _compiled[device, name]


def _compile(name: str, device: torch.device) -> ctypes.c_void_p | None:
    try:
        with torch.cuda.device(device):
            function: ctypes.c_void_p = torch.cuda._compile_kernel(_SOURCES[name], name).func
            return function
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError) as error:
        logging.getLogger(__name__).debug("the kernel %s is computed by eager torch: %s", name, error)
        return None


def launch(function: ctypes.c_void_p, device: torch.device, warps: int, *arguments: torch.Tensor | int) -> None:
    """A thread each for 32 lanes of ``warps``; on the current stream.

    By the driver's own call: torch's way to it takes 0.1 ms of the interpreter, for which the threads of a GPU wait.
    """
    values = [each if isinstance(each, int) else each.data_ptr() for each in arguments]
    slots = (ctypes.c_uint64 * len(values))(*values)
    first = ctypes.addressof(slots)
    addresses = (ctypes.c_void_p * len(values))(*range(first, first + ctypes.sizeof(slots), 8))
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid, threads = (-(-warps // _WARPS), 1, 1), (32 * _WARPS, 1, 1)
        torch.cuda.check_error(_driver().cuLaunchKernel(function, *grid, *threads, 0, stream, addresses, None))


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
