"""Quantize a folder in this process, by the functions that the command calls; on the CPU unless told otherwise."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.compute.cpu.cpu_arithmetic import CHUNK_BYTES, Cpu
from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.models.plan import plan_conversion, plan_quantization
from qz.quantize.models.run import carry_out
from qz.quantize.planning.dequantization import plan_dequantization
from qz.quantize.planning.membership import Membership
from qz.quantize.planning.plan import Plan
from qz.quantize.reports.summary import Source, Summary
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.measure import Measure
from qz.quantize.streaming.output.output_folders import Target


def method_of(name: str) -> Method:
    """A method of the grid: nf4, fp4, nf4-double, fp4-double, int8."""
    if name == "int8":
        return Int8()
    return FourBit("fp4" if name.startswith("fp4") else "nf4", double_quant=name.endswith("-double"))


def plan_of(source: Path, method: str, **settings: Any) -> Plan:
    return plan_quantization(open_checkpoint(LocalFolder(source)), Settings(method_of(method), **settings))


def quantized(source: Path, output: Path, method: str, **settings: Any) -> Summary:
    """``qz quantize SOURCE -o OUTPUT``."""
    wanted = Settings(method_of(method), **{"device": "cpu"} | settings)
    with closing(LocalFolder(source)) as folder:
        return carried_out(plan_quantization(open_checkpoint(folder), wanted), output, wanted)


def dequantized(source: Path, output: Path, *, chunk_bytes: int = CHUNK_BYTES, **settings: Any) -> Summary:
    """``qz dequantize SOURCE -o OUTPUT``."""
    wanted = Settings(None, **{"device": "cpu"} | settings)
    with closing(LocalFolder(source)) as folder:
        plan = plan_dequantization(open_checkpoint(folder), wanted)
        return carried_out(plan, output, wanted, chunk_bytes=chunk_bytes)


def carried_out(
    plan: Plan, output: Path, settings: Settings, measure: Measure | None = None, chunk_bytes: int = CHUNK_BYTES
) -> Summary:
    checkpoint = plan.checkpoint
    origin = Source(checkpoint.folder.location, None, None, checkpoint.library, plan.architecture.class_name)
    arithmetic = Cpu(chunk_bytes=chunk_bytes) if settings.device == "cpu" else None
    return carry_out(plan, origin, Target(output), settings, measure=measure, arithmetic=arithmetic)


def matching(skips: list[str], source: Path) -> list[str]:
    """Those of ``skips`` that match a module of the model, unless they leave nothing to quantize: both are refused."""
    wanted = Settings(FourBit("nf4"), skips=tuple(skips))
    with closing(LocalFolder(source)) as folder:
        plan = plan_conversion(open_checkpoint(folder), wanted, Membership(whole_pipeline=True))
    return [skip for skip in skips if skip not in plan.architecture.unmatched_skips] if plan.quantized else []
