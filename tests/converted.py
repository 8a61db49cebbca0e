"""Quantize a folder in this process, by the functions that the command calls; on the CPU unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qz.formats.checkpoint import open_checkpoint
from qz.formats.folder import LocalFolder
from qz.quantize.convert import Settings, Target, carry_out, plan_quantization
from qz.quantize.dequantize import plan_dequantization
from qz.quantize.methods import FourBit, Int8, Method
from qz.quantize.plan import Plan
from qz.quantize.summary import Source, Summary


def method_of(name: str) -> Method:
    """A method of the grid: nf4, fp4, nf4-double, int8."""
    if name == "int8":
        return Int8()
    return FourBit("fp4" if name == "fp4" else "nf4", double_quant=name.endswith("-double"))


def plan_of(source: Path, method: str, **settings: Any) -> Plan:
    return plan_quantization(open_checkpoint(LocalFolder(source)), Settings(method_of(method), **settings))


def quantized(source: Path, output: Path, method: str, **settings: Any) -> Summary:
    """``qz quantize SOURCE -o OUTPUT``."""
    settings = {"device": "cpu"} | settings
    plan = plan_of(source, method, **settings)
    origin = Source(str(source), None, None, plan.checkpoint.library, plan.architecture.class_name)
    try:
        return carry_out(plan, origin, Target(output), Settings(method_of(method), **settings))
    finally:
        plan.checkpoint.folder.close()


def dequantized(source: Path, output: Path, **settings: Any) -> Summary:
    """``qz dequantize SOURCE -o OUTPUT``."""
    settings = {"device": "cpu"} | settings
    plan = plan_dequantization(open_checkpoint(LocalFolder(source)), Settings(None, **settings))
    origin = Source(str(source), None, None, plan.checkpoint.library, plan.architecture.class_name)
    try:
        return carry_out(plan, origin, Target(output), Settings(None, **settings))
    finally:
        plan.checkpoint.folder.close()
