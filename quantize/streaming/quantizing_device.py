"""Which device quantizes: the one that the settings name, or on a host with a GPU its cores, for the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qz.quantize.compute.devices import arithmetic_on, as_cuda, cores_as_cuda, has_enough_cores, prewarm_cuda
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES
from qz.quantize.libraries.importing.gpu_driver import may_have_a_gpu
from qz.quantize.libraries.importing.lean_imports import gc_paused
from qz.quantize.planning.sources import packed_parts

if TYPE_CHECKING:
    from qz.quantize.compute.arithmetic import Arithmetic
    from qz.quantize.planning.plan import Plan
    from qz.quantize.settings import Settings


def arithmetic_for(plans: Iterable[Plan], settings: Settings, *, measured: bool = False) -> Arithmetic:
    """The arithmetic of ``settings.device``; see ``compute.devices``.

    ``auto`` takes the cores beside a GPU where they are faster and write the same bytes. ``measured``: the loss is
    computed on the way, which is the GPU's work.
    """
    if settings.device == "auto" and not measured:
        tasks = quantizing_tasks(plans)
        if tasks and (cores := cores_as_cuda(tasks)) is not None:
            return cores
    return arithmetic_on(settings.device)


def arithmetic_of_record(plans: Iterable[Plan], settings: Settings, recorded: str) -> Arithmetic:
    """The arithmetic to make again what was ``recorded`` to have the bytes of this kind of device.

    ``auto`` and ``cpu`` take the CPU where it writes these bytes, whether there is a GPU or not.
    """
    found = arithmetic_for(plans, settings)
    if found.bytes_of == recorded or settings.device not in ("auto", "cpu"):
        return found
    if recorded == "cpu":
        return arithmetic_on("cpu")
    tasks = quantizing_tasks(plans) if recorded == "cuda" else set()
    return (as_cuda(tasks, None) if tasks else None) or found


def quantizing_tasks(plans: Iterable[Plan]) -> set[tuple[str, str]]:
    """Methods with the dtypes of what they quantize; empty if there is anything else that a GPU computes otherwise."""
    tasks: set[tuple[str, str]] = set()
    for plan in plans:
        method = plan.method
        if plan.refinement is not None or (method is not None and method.double_quant):
            return set()
        for step in plan.steps:
            if any(packed_parts(source) for source in step.sources):
                return set()
            if method is not None and step.weight.quantized:
                tasks.add((method.name, SAFETENSORS_NAMES[step.weight.dtype]))
    return tasks


def prewarm(settings: Settings) -> bool:
    """Start the GPU while the libraries are imported, if it is likely to compute. Returns whether it is."""
    method = settings.method
    is_plain = method is not None and not method.double_quant and settings.scales == "absmax"
    if settings.device == "cpu" or (settings.device == "auto" and is_plain and has_enough_cores()):
        return False
    prewarm_cuda(settings.device)
    return settings.device != "auto" or may_have_a_gpu()


def import_torch() -> None:
    """Import torch ahead of its use."""
    with gc_paused():
        import torch  # noqa: F401
