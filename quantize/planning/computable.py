"""What the arithmetic can be given, checked when a plan is made: dtypes that it knows, and weights that hold values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from qz import MalformedInput, Unsupported
from qz.formats.malformed import quoted
from qz.quantize.libraries.architecture import FLOATS, SAFETENSORS_NAMES

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Step
    from qz.quantize.planning.sources import Source

COMPUTED = frozenset(SAFETENSORS_NAMES[name] for name in FLOATS)
"""The stored dtypes that kernels cast and quantize."""
CAST = COMPUTED | {"F64"}
"""Those that torch casts from and to. A class may make a scalar float64."""
COUNTS = frozenset(("I64", "I32"))
"""Of a single number, those that torch casts from: a class may hold a count of batches as a float. All others can only
be copied."""


def require_computable(steps: Iterable[Step], where: str) -> None:
    """Raise Unsupported for a weight to cast or quantize of any other dtype, MalformedInput for one without values."""
    for step in steps:
        weight, target = step.weight, SAFETENSORS_NAMES[step.weight.dtype]
        if weight.quantized and not weight.count:
            raise MalformedInput(
                f"{where}: {quoted(weight.name)} has the shape {list(weight.shape)}: there is nothing in it to "
                "quantize, and no loader takes such a layer quantized. Correct the sizes in config.json, or leave the "
                "layer out with --skip."
            )
        for source in step.sources:
            copied = not weight.quantized and (source.dtype == target or weight.conversion is not None)
            if not copied and not _castable(source, target, quantized=weight.quantized):
                act = f"quantized as {weight.dtype}" if weight.quantized else f"cast to {weight.dtype}"
                advice = "Choose one with --dtype" if source.dtype in CAST else "Convert it to one of them first"
                raise Unsupported(
                    f"{where}: {quoted(source.name)} is stored as {source.dtype} and would have to be {act}. qz "
                    f"computes with {', '.join(sorted(COMPUTED))} only. {advice}."
                )


def _castable(source: Source, target: str, *, quantized: bool) -> bool:
    if quantized:
        return source.dtype in CAST and target in COMPUTED
    is_count = source.dtype in COUNTS and not source.shape
    return (source.dtype in CAST or is_count) and target in CAST


def cast_by_torch(step: Step) -> bool:
    """Whether a weight is cast from or to a dtype that no kernel knows."""
    target = SAFETENSORS_NAMES[step.weight.dtype]
    return any(source.dtype != target and not {source.dtype, target} <= COMPUTED for source in step.sources)
