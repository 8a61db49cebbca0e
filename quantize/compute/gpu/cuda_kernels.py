"""The kernels of ``cuda_source``, compiled by the NVRTC that comes with torch when a device first needs them.

torch has no public name for that yet. Where it cannot compile, eager torch computes the same bits, in longer time.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch  # noqa: TID253 (this module is imported lazily)

from qz.quantize.compute.gpu import cuda_source

_SOURCES = {"search": cuda_source.SEARCH, "gptq": cuda_source.GPTQ}
_compiled: dict[tuple[torch.device, str], Any] = {}
_compiling = threading.Lock()
_WARPS = 8
"""Of a group of threads."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernel(name: str, device: torch.device) -> Any | None:
    """The function to launch on the ``device`` of a tensor, or None where there is none."""
    if device.type != "cuda":
        return None
    with _compiling:
        if (device, name) not in _compiled:
            _compiled[device, name] = _compile(name, device)
        return _compiled[device, name]


def _compile(name: str, device: torch.device) -> Any | None:
    try:
        with torch.cuda.device(device):
            return torch.cuda._compile_kernel(_SOURCES[name], name)
    except (AttributeError, ImportError, OSError, RuntimeError, TypeError) as error:
        logging.getLogger(__name__).debug("the kernel %s is computed by eager torch: %s", name, error)
        return None


def launch(function: Any, device: torch.device, warps: int, *arguments: torch.Tensor | int) -> None:
    """A thread each for 32 lanes of ``warps``; on the current stream."""
    groups = -(-warps // _WARPS)
    with torch.cuda.device(device):
        function(grid=(groups, 1, 1), block=(32 * _WARPS, 1, 1), args=list(arguments))
