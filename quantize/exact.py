"""What a model's own library says of its footprint and of each method, instead of the rule: ``qz inspect --plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qz import MalformedInput, QzError
from qz.formats.problems import Problem, worst_first
from qz.quantize.architecture import SAFETENSORS_NAMES, Architecture, Wish, examine
from qz.quantize.estimate import METHODS, Estimate, estimate
from qz.quantize.structure import WIDTHS, Value

if TYPE_CHECKING:
    from qz.formats.checkpoint import Checkpoint
    from qz.formats.quantized import QuantizedWeight
    from qz.quantize.inspection import Inspection


def with_plan(found: Inspection, checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> Inspection:
    """``found`` with exact figures. What keeps the library from giving them becomes a problem: an error if the tensors
    do not fit the class, a warning if the installed library does not have it."""
    try:
        if weights:
            return _of_quantized(found, checkpoint)
        if found.quantization is not None:
            return found
        return _of_plain(found, checkpoint)
    except MalformedInput as error:
        problem = Problem("error", "class-mismatch", "config.json", str(error))
    except QzError as error:
        problem = Problem("warning", "no-plan", "config.json", f"{error} So the figures are estimates.")
    return replace(found, problems=worst_first((*found.problems, problem)))


def _of_quantized(found: Inspection, checkpoint: Checkpoint) -> Inspection:
    from qz.quantize.dequantize import plan_dequantization
    from qz.quantize.settings import Settings

    architecture = plan_dequantization(checkpoint, Settings(None)).architecture
    return replace(
        found,
        parameters=architecture.parameters,
        memory_footprint=architecture.footprint.before,
        memory_footprint_exact=True,
    )


def _of_plain(found: Inspection, checkpoint: Checkpoint) -> Inspection:
    from qz.quantize.convert import equal_tensors

    # Every method takes the same weights, so one plan gives the figures of all.
    wish = Wish(METHODS["nf4"])
    architecture = examine(checkpoint, wish, equal=lambda one, other: equal_tensors(checkpoint, one, other))
    values = planned_values(architecture)
    return replace(
        found,
        parameters=architecture.parameters,
        memory_footprint=architecture.footprint.before,
        memory_footprint_exact=True,
        estimates={name: _exact(architecture, values, name, checkpoint) for name in METHODS},
    )


def planned_values(architecture: Architecture) -> list[Value]:
    """The tensors that the library would save, in its order, as the rule describes them."""
    values = []
    for saved in architecture.saved:
        weight = saved.weight
        if saved.part == "weight":
            dtype = SAFETENSORS_NAMES[weight.dtype]
            values.append(Value(saved.name, dtype, weight.shape, weight.count * WIDTHS[dtype], linear=True))
        elif not saved.part:
            values.append(Value(saved.name, saved.dtype, saved.shape, saved.nbytes))
    return values


def _exact(architecture: Architecture, values: list[Value], name: str, checkpoint: Checkpoint) -> Estimate:
    method = METHODS[name]
    sizes = estimate(values, method, checkpoint.library)
    less = sum(value.nbytes - method.footprint(value.count) for value in values if value.linear)
    return replace(sizes, memory_footprint=architecture.footprint.before - less, exact=True)
