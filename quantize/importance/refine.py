"""What is known of a model's inputs, brought to the weights that a plan quantizes."""

from __future__ import annotations

from qz.quantize.methods import FourBit
from qz.quantize.planning.membership import ALONE, Membership
from qz.quantize.planning.plan import Plan
from qz.quantize.planning.refinement import Refinement
from qz.quantize.settings import Settings

FP4_NOTE = (
    "fp4 with searched scales and no importance was measured to lose more than absmax on a language model: add "
    "--importance FILE, or use --nf4"
)


def refinement(plan: Plan, settings: Settings, member: Membership = ALONE) -> Refinement | None:
    """What ``settings`` say of the weights that ``plan`` quantizes; None where nothing is refined.

    Raises MissingInput and MalformedInput for a file of importance that cannot be used.
    """
    if settings.scales == "absmax" or not isinstance(plan.method, FourBit):
        return None
    if settings.importance is None:
        return Refinement(notes=(FP4_NOTE,) if plan.method.name == "fp4" else ())
    from qz.quantize.compute.scale_search import tiled_weights
    from qz.quantize.importance import matching

    quantized = [step for step in plan.steps if step.act == "quantize"]
    statistics = matching.read_importance(settings.importance, quantized, member)
    matched = matching.match(statistics, quantized, member)
    columns = {name: matching.column_weights(sums) for name, sums in matched.sums.items()}
    hessians, notes = {}, matching.warnings(statistics, matched)
    if settings.rounding == "gptq":
        hessians = matching.hessians(statistics, matched)
        notes = (*notes, *matching.gptq_warnings(statistics, matched, hessians))
    return Refinement(
        settings.rounding,
        {name: tiled_weights(weights) for name, weights in columns.items() if weights is not None},
        matching.described(statistics, matched),
        notes,
        hessians,
        statistics.hessian,
    )
