"""Plan a pipeline for a size in memory: a method for each component, then its most sensitive linears unquantized."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qz import MalformedInput, QzError, Unsupported, UsageError
from qz.formats.checkpoint.pipeline import Component, Pipeline
from qz.quantize.libraries.architecture import Footprint, LoadRequest
from qz.quantize.libraries.examine import examine
from qz.quantize.methods import Int8, Method
from qz.quantize.planning.budget.component_sizes import Combination, Option, combinations, largest_within
from qz.quantize.planning.budget.kept_layers import Point, readable
from qz.quantize.planning.budget.shared_loss import shared_room
from qz.quantize.planning.components import Choice, kind_of
from qz.quantize.planning.dequantization import refuse_codes
from qz.quantize.planning.plan import Plan
from qz.quantize.planning.unquantized import contradiction
from qz.quantize.planning.unreadable import KEPT
from qz.quantize.settings import Settings

_COMPANION = re.compile(r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format|quant_state\..*)\Z")

Planned = Callable[[Choice, int | None], Plan]
"""The plan of a component with the method of its choice, and the size that it may have."""
Scored = Callable[[Choice, Plan], Sequence[Point] | None]
"""What each linear more at 16 bit takes and saves of a component's loss; None where no scores say so."""


@dataclass(frozen=True, slots=True)
class FittedToSize:
    """What a size makes of a pipeline: each component's choice and plan, and the combinations there were."""

    choices: tuple[Choice, ...]
    plans: Mapping[str, Plan]
    combinations: tuple[Combination, ...]


def fit_to_size(
    pipeline: Pipeline, choices: Sequence[Choice], settings: Settings, planned: Planned, scored: Scored
) -> FittedToSize:
    """Choose methods for the components that ``choices`` quantize and that have none of their own in ``settings``.

    Raises UsageError for a size that is too small, or needs no quantization; what ``planned`` raises for a component
    that was asked for.
    """
    target = settings.target_size
    assert target is not None  # checked by the caller
    plans: dict[tuple[str, str], Plan] = {}
    options: list[list[Option]] = []
    fixed, made = 0, list(choices)
    for number, choice in enumerate(choices):
        own = _options(choice, settings, planned, plans)
        if isinstance(own, Unsupported):
            made[number] = replace(choice, method=None, reason=f"{KEPT}: {own}")
            own = []
        if len(own) > 0:
            options.append(own)
        elif choice.component.checkpoint is not None:
            fixed += unquantized(choice.component, settings.dtype).after
    found = combinations(options, fixed, sum(each.parameters for each in pipeline.components))
    where = pipeline.folder.location
    best = largest_within(found, target)
    if best is None:
        smaller = " With --nf4 it would be smaller." if isinstance(settings.method, Int8) else ""
        raise UsageError(
            f"--target-size {readable(target)} is not possible: {where} takes at least {readable(found[0].size)} in "
            f"memory.{smaller}"
        )
    chosen = {option.component: option for option in best.options}
    if not any(option.method is not None for option in chosen.values()):
        raise UsageError(
            f"--target-size {readable(target)}: {where} fits as it is, with {readable(best.size)} in memory. Use it "
            "unquantized."
        )
    made = [_chosen(choice, chosen.get(choice.name), settings) for choice in made]
    return FittedToSize(tuple(made), _filled(made, plans, target - best.size, planned, scored), found)


def unquantized(component: Component, dtype: str = "auto") -> Footprint:
    """Of a component that is not quantized: the library's figure, or what is stored if the library does not know it."""
    return kept_footprint(component, dtype)[0]


def kept_footprint(component: Component, dtype: str = "auto") -> tuple[Footprint, QzError | None]:
    """As ``unquantized``, and what keeps the library from loading the component as it is: tensors that do not fit its
    class or its config. What qz itself cannot handle is no fault of it."""
    checkpoint = component.checkpoint
    assert checkpoint is not None
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values() if not _COMPANION.search(tensor.name))
    stored = Footprint(nbytes, nbytes)
    if (fault := contradiction(checkpoint)) is not None:
        return stored, fault
    if component.quantization is not None or checkpoint.encoded_as is not None:
        return stored, None
    try:
        architecture = examine(checkpoint, LoadRequest(None, dtype))
        refuse_codes(checkpoint, architecture, checkpoint.tensors)
    except QzError as error:
        return stored, error if isinstance(error, MalformedInput) else None
    return architecture.footprint, None


def _options(
    choice: Choice, settings: Settings, planned: Planned, plans: dict[tuple[str, str], Plan]
) -> list[Option] | Unsupported:
    """Of one component, none where it stays as it is; Unsupported, not raised, where it cannot be quantized."""
    if choice.method is None:
        return []
    free = choice.name not in settings.component_methods
    methods: list[Method] = [choice.method]
    if free and not isinstance(choice.method, Int8):
        methods.append(next((own for own in settings.component_methods.values() if isinstance(own, Int8)), Int8()))
    found: list[Option] = []
    for method in methods:
        try:
            plan = planned(replace(choice, method=method), None)
        except Unsupported as error:
            if method is not choice.method:
                continue
            if choice.asked_for:
                raise
            return error
        plans[choice.name, method.name] = plan
        quantized = sum(weight.count for weight in plan.quantized)
        found.append(Option(choice.name, method, plan.architecture.footprint.after, quantized))
    if free:
        found.append(Option(choice.name, None, unquantized(choice.component, settings.dtype).after, 0))
    return found


def _chosen(choice: Choice, option: Option | None, settings: Settings) -> Choice:
    if option is None or choice.name in settings.component_methods:
        return choice
    reason = "stays as it is: it fits" if option.method is None else f"{choice.reason}; {option.method.name} fits"
    return replace(choice, method=option.method, reason=reason)


def _filled(
    choices: Sequence[Choice],
    plans: Mapping[tuple[str, str], Plan],
    left: int,
    planned: Planned,
    scored: Scored,
) -> dict[str, Plan]:
    """Plans of the quantized components, which share the ``left`` bytes: where scores tell of all, the linears that are
    worth most, of whichever; else the denoiser first, then the largest."""
    quantized = [choice for choice in choices if choice.method is not None]
    least = {each.name: plans[each.name, each.method.name] for each in choices if each.method is not None}
    curves = {each.name: points for each in quantized if (points := scored(each, least[each.name])) is not None}
    if len(curves) == len(quantized):
        sizes = shared_room(curves, left)
        return {choice.name: planned(choice, sizes[choice.name]) for choice in quantized}
    order = sorted(
        quantized,
        key=lambda choice: (kind_of(choice.component) != "denoiser", -choice.component.parameters),
    )
    found = {}
    for choice in order:
        size = least[choice.name].architecture.footprint.after
        found[choice.name] = planned(choice, size + left)
        left -= found[choice.name].architecture.footprint.after - size
    return {choice.name: found[choice.name] for choice in quantized}
