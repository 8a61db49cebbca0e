"""Where the arithmetic runs: the CPU's own kernels here, bitsandbytes' operations on an accelerator."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from qz import QzError, TryAgain, Unsupported, UsageError
from qz.out_of_memory import is_out_of_memory
from qz.quantize.compute import cuda_tables
from qz.quantize.compute.cores import usable_cores
from qz.quantize.compute.cpu.cpu_arithmetic import Cpu
from qz.quantize.libraries.importing.gpu_driver import compute_capability, may_have_a_gpu
from qz.quantize.libraries.importing.lean_imports import gc_paused

if TYPE_CHECKING:
    import torch

    from qz.quantize.compute.arithmetic import Arithmetic
    from qz.quantize.compute.gpu.gpu_arithmetic import Accelerator

TAKEN = "busy or unavailable"
"""What CUDA says where other processes leave too little memory for its own context."""
ENOUGH_CORES = 8
"""With so many, what a GPU does in a fraction of a second is done before torch is imported and the GPU is awake."""
NVIDIA_DRIVER = "https://www.nvidia.com/drivers"
TORCH_BUILDS = "https://pytorch.org/get-started/locally"


def prewarm_cuda(device: str) -> None:
    """Let the driver make its context for the first GPU while the libraries are imported: it takes a third of a second.

    In a thread that imports nothing, so that it cannot get in the way of the imports. What fails here fails again where
    it can be told.
    """
    kind, _, number = device.partition(":")
    if kind in ("auto", "cuda"):
        threading.Thread(target=_make_context, args=(int(number or 0),), daemon=True).start()


def _make_context(number: int) -> None:
    """CUDA's primary context of a device, which torch will use, by the driver's own functions."""
    with suppress(OSError, AttributeError):
        driver, found, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(found), number) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), found)


def arithmetic_on(device: str) -> Arithmetic:
    """The arithmetic of a ``--device``: ``auto``, ``cpu``, ``cuda[:N]``, ``xpu[:N]`` or ``mps``.

    ``auto`` is all GPUs like the first one, if CUDA works here, else the CPU; where there is a GPU that does not work,
    ``notes`` says why. Raises UsageError for a device that is not there, Unsupported for one that bitsandbytes cannot
    use, TryAgain for one without memory.
    """
    if device == "cpu" or (device == "auto" and not may_have_a_gpu()):
        return Cpu()
    with gc_paused():
        import torch
    if device != "auto":
        return _accelerator(device)
    if not torch.cuda.is_available():
        return Cpu()
    try:
        return _accelerator("cuda")
    except QzError as error:
        return Cpu(notes=(f"computed on the CPU: {error}",))


def cores_as_cuda(tasks: Collection[tuple[str, str]]) -> Cpu | None:
    """The CPU, if it writes the bytes that the GPU here would write, and has cores enough to be done first.

    ``tasks``: methods with the dtypes of what they quantize. None where there is no GPU that CUDA knows, or where the
    GPU is to compute.
    """
    if not has_enough_cores() or not may_have_a_gpu():
        return None
    capability = compute_capability()
    return as_cuda(tasks, capability) if capability is not None else None


def has_enough_cores() -> bool:
    """Whether the cores are done before a GPU is awake."""
    return usable_cores() >= ENOUGH_CORES


def as_cuda(tasks: Collection[tuple[str, str]], capability: tuple[int, int] | None) -> Cpu | None:
    """The CPU with the bytes of a GPU, of which the ``capability`` may be unknown; None if it does not know them."""
    from qz.quantize.compute import backends

    known = all(cuda_tables.is_known(*task, capability) and backends.follows_cuda(task[0]) for task in tasks)
    return Cpu(bytes_of="cuda") if known else None


def _accelerator(device: str) -> Accelerator:
    """All devices like the first, or the one that is named. Its first operation is tried, see ``arithmetic_on``."""
    import torch

    from qz.quantize.compute.gpu.gpu_arithmetic import Accelerator

    kind, _, number = device.partition(":")
    _require(kind)
    found = torch.get_device_module(kind).device_count()
    if number and int(number) >= found:
        raise UsageError(f"There is no {device} here, only {kind}:0 to {kind}:{found - 1}. Choose one of them.")
    devices = [torch.device(kind, int(number))] if number else _alike(kind, found)
    try:
        return Accelerator(devices, device)
    except (RuntimeError, NotImplementedError, AttributeError, ImportError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_out_of_memory(error) or TAKEN in first_line:
            raise TryAgain(
                f"{device} has no memory left for this ({first_line}). Free GPU memory (close other processes) and run "
                "the same command again, or use --device cpu."
            ) from error
        raise Unsupported(
            f"bitsandbytes does not work on {device} here: {first_line}. `python -m bitsandbytes` tells more; "
            "or use --device cpu."
        ) from error


def _alike(kind: str, found: int) -> list[torch.device]:
    """The devices that compute like the first: a mixed host would write bytes that depend on who took which chunk."""
    import torch

    if kind != "cuda":
        return [torch.device(kind)]
    first = torch.cuda.get_device_properties(0)
    like = [n for n in range(found) if torch.cuda.get_device_properties(n).name == first.name]
    return [torch.device("cuda", n) for n in like]


def _require(kind: str) -> None:
    """Raise UsageError, with the reason and the next step, unless torch can use this kind of device here."""
    import torch

    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("--device mps needs a Mac with Apple silicon, and this is none. Use --device cpu.")
    elif not torch.get_device_module(kind).is_available():
        built = torch.version.cuda or torch.version.hip if kind == "cuda" else getattr(torch.version, "xpu", None)
        if not built:
            raise UsageError(
                f"--device {kind}: torch {torch.__version__} is built without it. Install a build that has it "
                f"({TORCH_BUILDS}), or use --device cpu."
            )
        driver = f"no NVIDIA driver works here ({NVIDIA_DRIVER})" if kind == "cuda" else "no driver works here"
        raise UsageError(f"--device {kind}: {driver}, or no such device is visible. Check it, or use --device cpu.")
