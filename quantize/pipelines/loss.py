"""Plan a pipeline for a loss: of all its components the linears that suffer most for their bytes stay unquantized.

Scores of a pipeline's components have one unit, the squared relative error of what its denoisers return, and add up
nearly; so do the scores of one component's linears.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qz import UsageError
from qz.formats.checkpoint.pipeline import Pipeline
from qz.quantize.importance.score_file import unscored
from qz.quantize.pipelines.size import unquantized
from qz.quantize.planning.budget.kept_layers import KeptLayers, Point, readable
from qz.quantize.planning.budget.shared_loss import Curve, loss_at, walk
from qz.quantize.planning.components import Choice, plan_each
from qz.quantize.planning.plan import Plan
from qz.quantize.settings import Settings

Planned = Callable[[Choice, float], Plan]
"""The plan of a component with the method of its choice that loses no more than so much."""


@dataclass(frozen=True, slots=True)
class FittedToLoss:
    """What a loss makes of a pipeline: each component's choice and plan, and what is kept of all."""

    choices: tuple[Choice, ...]
    plans: Mapping[str, Plan]
    kept: KeptLayers


def fit_to_loss(pipeline: Pipeline, choices: Sequence[Choice], settings: Settings, planned: Planned) -> FittedToLoss:
    """Choose what stays unquantized, so that the pipeline loses at most ``settings.max_loss``.

    Raises UsageError for a component without scores, or of another method's, and for a loss that leaves nothing to
    quantize or needs more than ``settings.target_size``; what ``planned`` raises for a component that was asked for.
    """
    most, where = settings.max_loss, pipeline.folder.location
    assert most is not None  # checked by the caller
    if without := unscored(settings, [choice.name for choice in choices if choice.method is not None]):
        raise UsageError(
            f"--max-loss needs scores of all that is quantized, and {settings.scores or settings.importance} has none "
            f"of {', '.join(without)}. Make it with `qz calibrate PIPELINE --scores`, or leave these as they are with "
            f"--component {without[0]}=none."
        )
    made, plans = plan_each(choices, lambda choice: planned(choice, sys.float_info.max))
    curves = {name: Curve(_kept(plan).curve) for name, plan in plans.items()}
    fixed = sum(
        unquantized(choice.component, settings.dtype).after
        for choice in made
        if choice.component.checkpoint is not None and choice.name not in plans
    )
    points, chosen = walk(list(curves.values()), fixed, most)
    if all(curve.at + 1 == len(curve.points) for curve in curves.values()):
        raise UsageError(
            f"--max-loss {most}: all that {where} has would have to stay as it is. Use it unquantized, or allow more."
        )
    final = {choice.name: choice for choice in made}
    for name, curve in curves.items():
        choice = final[name]
        if curve.at + 1 < len(curve.points):
            plans[name] = planned(choice, loss_at(curve.point))
        elif name in settings.component_methods:
            raise UsageError(
                f"--max-loss {most}: all of {name} would have to stay as it is. Say --component {name}=none, or allow "
                "more."
            )
        else:
            del plans[name]
            final[name] = replace(choice, method=None, reason="stays as it is: it would lose too much")
    size = fixed + sum(  # more than was chosen, where a library's list of names matches more linears
        plans[name].architecture.footprint.after if name in plans else curve.point.size
        for name, curve in curves.items()
    )
    if settings.target_size is not None and size > settings.target_size:
        raise UsageError(
            f"--max-loss {most} with --target-size {readable(settings.target_size)}: {where} takes "
            f"{readable(size)} to lose no more. Allow one of them more."
        )
    return FittedToLoss(tuple(final.values()), plans, _kept_of_all(plans, points, chosen, settings))


def _kept_of_all(plans: Mapping[str, Plan], points: Sequence[Point], chosen: Point, settings: Settings) -> KeptLayers:
    """What is kept of all components together, at the ``chosen`` one of ``points``, from nothing kept to everything."""
    kept = {name: _kept(plan) for name, plan in plans.items()}
    scores = next((each.scores for each in kept.values() if each.scores is not None), None)
    return KeptLayers(
        settings.target_size,
        settings.max_loss,
        settings.split_groups,
        {**scores, "total": points[0].loss} if scores is not None else None,
        tuple(f"{name}/{path}" for name, each in kept.items() for path in each.kept),
        chosen.loss,
        tuple(points),
    )


def _kept(plan: Plan) -> KeptLayers:
    assert plan.kept_layers is not None  # it was planned for a loss
    return plan.kept_layers
