"""What a model's own library says of its footprint and of each method, instead of the rule: ``qz inspect --plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from qz import MalformedInput, QzError
from qz.counted import counted
from qz.formats.checkpoint.problems import Problem, worst_first
from qz.formats.malformed import quoted
from qz.quantize.inspection.estimate import METHODS, Estimate

if TYPE_CHECKING:
    from qz.formats.checkpoint.quantization.quantized import QuantizedWeight
    from qz.formats.checkpoint.survey import Checkpoint
    from qz.quantize.inspection.report import Inspection
    from qz.quantize.libraries.architecture import Architecture


def with_plan(found: Inspection, checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> Inspection:
    """``found`` with exact figures. What keeps the library from giving them becomes a problem: an error if the tensors
    do not fit the class, a warning if the installed library does not have it."""
    try:
        if weights:
            return _of_quantized(found, checkpoint)
        if found.quantization is not None and found.estimates is None and checkpoint.encoded_as is None:
            return found
        return _of_plain(found, checkpoint)
    except MalformedInput as error:
        problem = Problem("error", "class-mismatch", "config.json", str(error))
    except QzError as error:
        problem = Problem("warning", "no-plan", "config.json", f"{error} So the figures are estimates.")
    return replace(found, problems=worst_first((*found.problems, problem)))


def _of_quantized(found: Inspection, checkpoint: Checkpoint) -> Inspection:
    from qz.quantize.planning.dequantization import plan_dequantization
    from qz.quantize.settings import Settings

    architecture = plan_dequantization(checkpoint, Settings(None)).architecture
    shapes = {tensor.name: tensor.original or () for tensor in found.tensors}
    # Quantized experts are reported as a problem of their own.
    others = (name for name in architecture.packed_elsewhere if ".experts." not in name)
    if elsewhere := tuple(name for name in others if len(shapes.get(name, ())) != 3):
        found = replace(
            found, problems=worst_first((*found.problems, _cannot_load(checkpoint, architecture, elsewhere)))
        )
    return replace(
        found,
        parameters=architecture.parameters,
        memory_footprint=architecture.footprint.before,
        memory_footprint_exact=True,
    )


def _cannot_load(checkpoint: Checkpoint, architecture: Architecture, elsewhere: tuple[str, ...]) -> Problem:
    where, count = checkpoint.folder.location, len(elsewhere)
    message = (
        f"{where}: {counted(count, 'quantized weight')} (first {quoted(elsewhere[0])}) cannot be "
        f"loaded: {architecture.class_name} has no linear layer of that name: it merges weights, or reads them. "
        f"`qz dequantize {where}` gives a model that loads, and can be quantized again."
    )
    return Problem("warning", "class-mismatch", "config.json", message)


def _of_plain(found: Inspection, checkpoint: Checkpoint) -> Inspection:
    from qz.quantize.models.plan import plan_conversion
    from qz.quantize.settings import Settings

    plans = {name: plan_conversion(checkpoint, Settings(method)) for name, method in METHODS.items()}
    architecture = plans["nf4"].architecture
    encoded = found.quantization is not None  # by another tool: no library tells the footprint of its format
    return replace(
        found,
        parameters=architecture.parameters,
        memory_footprint=found.memory_footprint if encoded else architecture.footprint.before,
        memory_footprint_exact=not encoded,
        estimates={
            name: Estimate(
                bytes=sum(shard.size for shard in plan.shards),
                memory_footprint=plan.architecture.footprint.after,
                quantized_parameters=sum(weight.count for weight in plan.quantized),
                exact=True,
            )
            for name, plan in plans.items()
        },
    )
