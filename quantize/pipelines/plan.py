"""Whole pipelines: a plan for each component that is converted, all else carried over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from qz import QzError, Unsupported, UsageError
from qz.formats.checkpoint.adapter_file import AdapterFile
from qz.formats.checkpoint.pipeline import Component, Pipeline
from qz.formats.files.folder import PIPELINE_INDEX, Folder
from qz.formats.output import companions
from qz.formats.output.damaged import require_undamaged
from qz.quantize.adapters.placement import Placement, placements
from qz.quantize.importance.score_file import refuse_unscored, score_file
from qz.quantize.libraries.architecture import Footprint, LoadRequest
from qz.quantize.libraries.companions.notes import notes_on_component, require_vocabulary
from qz.quantize.libraries.examine import examine, examining
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.methods import FourBit, Method
from qz.quantize.models.plan import plan_quantization
from qz.quantize.pipelines.loss import fit_to_loss
from qz.quantize.pipelines.size import fit_to_size, kept_footprint
from qz.quantize.planning.budget.component_sizes import Combination
from qz.quantize.planning.budget.kept_layers import KeptLayers, Point, curve_of
from qz.quantize.planning.components import Choice, choose, plan_each, without_weights
from qz.quantize.planning.fusing import fused
from qz.quantize.planning.membership import Membership
from qz.quantize.planning.nearest import nearest, refuse_unmatched
from qz.quantize.planning.plan import Plan, make_plan
from qz.quantize.planning.unquantized import contradiction, equal_tensors
from qz.quantize.planning.unreadable import KEPT, kept_unread
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.loss import Loss
from qz.quantize.streaming.measuring.measure import Measure
from qz.quantize.streaming.output.output_folders import OutputFolder, model_folder


@dataclass(frozen=True)
class PipelinePlan:
    """What happens to each component. ``plans`` has those that are converted, ``kept`` the footprint of the others.

    ``casts`` are those that are not converted, but written in another dtype.
    """

    pipeline: Pipeline
    choices: tuple[Choice, ...]
    plans: Mapping[str, Plan]
    kept: Mapping[str, Footprint]
    casts: Mapping[str, Plan] = field(default_factory=dict)
    adapters: tuple[AdapterFile, ...] = ()
    """LoRAs that are fused into any of them."""
    combinations: tuple[Combination, ...] = ()
    """Methods of the components that were chosen from, for a size."""
    kept_layers: KeptLayers | None = None
    """Of all components together, for a loss."""
    notes: tuple[str, ...] = ()
    """What the user should know of what was asked for."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """What measures the loss of those in ``plans``, if that was asked for."""

    def losses(self) -> dict[str, Loss]:
        """What was measured, by component."""
        return {name: measure.loss() for name, measure in self.measures.items()}

    @property
    def source_folders(self) -> dict[str, Folder]:
        """Those of the source: its root under the empty name, and each component's.

        Of one file the folder that it lies in is the root, and the configs' has the name of their index.
        """
        inside = {component.name: component.folder for component in self.pipeline.components}
        if self.pipeline.file_folder is not None:
            return {"": self.pipeline.file_folder, PIPELINE_INDEX: self.pipeline.folder, **inside}
        return {"": self.pipeline.folder, **inside}

    @property
    def carried(self) -> tuple[companions.Companion, ...]:
        """All that is copied."""
        return tuple(each for folder in self.output_folders for each in folder.carried)

    @property
    def output_folders(self) -> tuple[OutputFolder, ...]:
        """The folders of the output: its root, and one for each component."""
        root, made = self.pipeline.folder, self.pipeline.index
        index = companions.Companion(root, PIPELINE_INDEX, PIPELINE_INDEX, root.sizes()[PIPELINE_INDEX])
        carried = companions.terms(root) if made is not None else (index, *companions.terms(root))
        folders = [OutputFolder("", None, carried, {PIPELINE_INDEX: made} if made is not None else {})]
        for component in (choice.component for choice in self.choices):
            plan = self.plans.get(component.name) or self.casts.get(component.name)
            if plan is not None:
                carried, measure = companions.companions(component.folder), self.measures.get(component.name)
                folders.append(model_folder(plan, carried, component.name, measure))
            elif component.is_of_onnx:
                folders.append(OutputFolder(component.name, None, companions.of_onnx(component.folder)))
            elif component.unread is not None:
                folders.append(OutputFolder(component.name, None, companions.whole(component.folder)))
            elif component.checkpoint is not None:
                carried, documents = companions.weights(component.checkpoint)
                folders.append(OutputFolder(component.name, None, carried, documents))
            else:
                folders.append(OutputFolder(component.name, None, companions.settings(component.folder)))
        return tuple(folders)


def plan_pipeline(pipeline: Pipeline, settings: Settings) -> PipelinePlan:
    """Choose components and plan each. ``settings.skips`` of the form COMPONENT/PATTERN hold for that one only.

    A component that was not asked for by name, and that its library cannot quantize, is kept: its reason says why.
    Raises UsageError, Unsupported and MalformedInput as ``choose`` and ``plan_quantization`` do.
    """
    if settings.weights_only:
        raise UsageError(
            "--weights-only leaves out what a pipeline needs to be loaded. Use --subfolder for one component."
        )
    if settings.method is None:
        raise ValueError("a pipeline is quantized by a method")
    pipeline = plain_pipeline(pipeline)
    with _examining(pipeline):
        return _plan_chosen(pipeline, settings, settings.method)


def _plan_chosen(pipeline: Pipeline, settings: Settings, method: Method) -> PipelinePlan:
    unread = kept_unread(pipeline, {name for name, own in settings.component_methods.items() if own is None})
    choices = choose(pipeline, method, settings.components, settings.component_methods)
    choices = tuple(
        replace(choice, reason=unread.get(choice.name, choice.reason)) if choice.method is None else choice
        for choice in choices
    )
    _require_skips(pipeline, settings.skips)
    if settings.chooses_layers:
        return _fitted(pipeline, choices, settings)
    made, plans = plan_each(choices, lambda choice: _plan(choice, _own_settings(choice, settings)))
    _require_matches(plans, settings.skips)
    return compose(pipeline, made, plans, settings)


def _fitted(pipeline: Pipeline, choices: tuple[Choice, ...], settings: Settings) -> PipelinePlan:
    """The plan for ``settings.target_size`` or ``max_loss``."""
    refuse_unscored(settings, (choice.name for choice in choices if choice.method is not None))

    if settings.max_loss is not None:

        def losing(choice: Choice, most: float) -> Plan:
            return _plan(choice, _own_settings(choice, replace(settings, max_loss=most, target_size=None)))

        made = fit_to_loss(pipeline, choices, settings, losing)
        _require_matches(made.plans, settings.skips)
        return replace(compose(pipeline, made.choices, made.plans, settings), kept_layers=made.kept)

    def planned(choice: Choice, size: int | None) -> Plan:
        chooses = {"target_size": size} if size else {"target_size": None, "scores": None, "split_groups": False}
        own = replace(settings, **chooses)
        return _plan(choice, _own_settings(choice, own))

    def scored(choice: Choice, plan: Plan) -> Sequence[Point] | None:
        own = _own_settings(choice, settings)
        file = score_file(own, Membership(choice.name, whole_pipeline=True))
        if file is None or plan.method is None or file.scores.method != plan.method.name:
            return None
        return curve_of(plan, own, file)

    found = fit_to_size(pipeline, choices, settings, planned, scored)
    _require_matches(found.plans, settings.skips)
    return replace(compose(pipeline, found.choices, found.plans, settings), combinations=found.combinations)


def plan_way_back(pipeline: Pipeline, settings: Settings) -> PipelinePlan:
    """Dequantize every component that bitsandbytes quantized; the others are kept. Unsupported if there is none."""
    if settings.weights_only:
        raise UsageError(
            "--weights-only leaves out what a pipeline needs to be loaded. Use --subfolder for one component."
        )
    pipeline = plain_pipeline(pipeline)
    with _examining(pipeline):
        return _plan_quantized(pipeline, settings)


def _plan_quantized(pipeline: Pipeline, settings: Settings) -> PipelinePlan:
    from qz.quantize.planning.dequantization import plan_dequantization

    unread = kept_unread(pipeline)
    total = sum(component.parameters for component in pipeline.components)
    choices: list[Choice] = []
    plans: dict[str, Plan] = {}
    for component in pipeline.components:
        encoded = component.checkpoint.encoded_as if component.checkpoint is not None else None
        method = encoded or (component.quantization or {}).get("quant_method")
        reason = unread.get(component.name) or (
            without_weights(component)
            if component.checkpoint is None
            else f"quantized with {method}"
            if method
            else "not quantized"
        )
        if component.checkpoint is not None and (encoded is not None or method == "bitsandbytes"):
            member = Membership(component.name, whole_pipeline=True)
            plans[component.name] = plan_dequantization(component.checkpoint, settings, member)
            reason = "dequantized"
        choices.append(Choice(component, None, reason, component.parameters / max(total, 1)))
    if not plans:
        raise Unsupported(
            f"No component of {pipeline.folder.location} is quantized in a way that qz knows: nothing to dequantize."
        )
    return compose(pipeline, tuple(choices), plans, settings)


def plain_pipeline(pipeline: Pipeline) -> Pipeline:
    """With the components that another tool quantized as the plain ones that they stand for, where that is known.

    A damaged one stays as it is: it may be left alone, and planning it says what is wrong.
    """

    def plain(component: Component) -> Component:
        try:
            return replace(component, checkpoint=component.checkpoint and plain_checkpoint(component.checkpoint))
        except QzError:
            return component

    return replace(pipeline, components=tuple(map(plain, pipeline.components)))


def _examining(pipeline: Pipeline) -> AbstractContextManager[None]:
    return examining(component.checkpoint for component in pipeline.components if component.checkpoint is not None)


def compose(
    pipeline: Pipeline, choices: tuple[Choice, ...], plans: Mapping[str, Plan], settings: Settings
) -> PipelinePlan:
    """The plan of a whole pipeline from plans of some of its components; the others are kept.

    A dtype that was asked for is theirs, too, as ``torch_dtype`` is of all components where diffusers loads a pipeline.
    """
    others = [each for each in pipeline.components if each.checkpoint and each.name not in plans]
    kept: dict[str, Footprint] = {}
    faults: dict[str, QzError] = {}
    for each in others:
        kept[each.name], fault = kept_footprint(each)
        if fault is not None:
            faults[each.name] = fault
    loras = settings.loras
    placed = _placed(pipeline, loras)
    plans = {name: fused(plan, placed[name], loras) if name in placed else plan for name, plan in plans.items()}
    casts: dict[str, Plan] = {}
    made = {choice.name: choice for choice in choices}
    for each in others:
        choice = made[each.name]
        if each.name in placed:
            casts[each.name] = fused(_unquantized(each, settings), placed[each.name], loras)
            made[each.name] = replace(choice, reason=f"{choice.reason}; LoRA fused")
            continue
        if each.in_other_file:  # it has no file of its own to copy
            casts[each.name] = _unquantized(each, settings)
            continue
        if each.name in faults:
            made[each.name] = replace(choice, reason=f"{KEPT}: {faults[each.name]}")
            continue
        if settings.dtype == "auto":
            continue
        try:
            cast = _cast(each, settings)
        except QzError as error:
            made[each.name] = replace(choice, reason=f"{KEPT}, not cast to {settings.dtype}: {error}")
            continue
        if cast is not None:
            casts[each.name] = cast
            made[each.name] = replace(choice, reason=f"{choice.reason}; cast to {settings.dtype}")
    notes = _notes_on_settings(pipeline)
    final = tuple(made[choice.name] for choice in choices)
    plan = PipelinePlan(pipeline, final, plans, kept, casts, loras, notes=notes)
    require_undamaged(plan.carried)
    return plan


def _notes_on_settings(pipeline: Pipeline) -> tuple[str, ...]:
    """On components without weights. Raises MissingInput for one that cannot be loaded."""
    notes: list[str] = []
    for each in pipeline.components:
        if each.checkpoint is None and each.unread is None:
            require_vocabulary(each.folder, each.library, each.class_name)
            found = notes_on_component(each.folder, each.library, each.class_name)
            notes += (note.as_text(f"{each.name}/") for note in found)
    return tuple(notes)


def _placed(pipeline: Pipeline, loras: tuple[AdapterFile, ...]) -> dict[str, list[Placement]]:
    """What LoRAs change, by component."""
    models = {each.name: each.checkpoint for each in pipeline.components if each.checkpoint is not None}
    placed: dict[str, list[Placement]] = {}
    for lora in loras:
        for placement in placements(lora, models, pipeline.class_name):
            placed.setdefault(placement.component, []).append(placement)
    return placed


def _unquantized(component: Component, settings: Settings) -> Plan:
    """The plan that writes a component as it is, or in the dtype that was asked for. Raises Unsupported for a quantized
    one."""
    checkpoint = component.checkpoint
    assert checkpoint is not None
    if (fault := contradiction(checkpoint)) is not None:
        raise fault
    if component.quantization is not None:
        raise Unsupported(f"{component.name} is quantized with {component.quantization.get('quant_method')}.")
    request = LoadRequest(None, settings.dtype)
    architecture = examine(checkpoint, request, equal=lambda one, other: equal_tensors(checkpoint, one, other))
    return make_plan(checkpoint, architecture, None, settings.max_shard_bytes)


def _cast(component: Component, settings: Settings) -> Plan | None:
    """The plan that writes an unquantized component in the dtype that was asked for; None if it is so already."""
    plan = _unquantized(component, settings)
    architecture = plan.architecture
    stored = {step.weight.name: {source.dtype for source in step.sources} for step in plan.steps}
    same = all(stored[saved.weight.name] == {saved.dtype} for saved in architecture.saved)
    return None if same else plan


def _own_settings(choice: Choice, settings: Settings) -> Settings:
    own = f"{choice.name}/"
    skips = tuple(skip.removeprefix(own) for skip in settings.skips if "/" not in skip or skip.startswith(own))
    if not isinstance(choice.method, FourBit):  # int8 has no search
        settings = replace(settings, scales="absmax", importance=None, rounding="nearest")
    return replace(settings, method=choice.method, skips=skips)


def _require_skips(pipeline: Pipeline, skips: tuple[str, ...]) -> None:
    names = [component.name for component in pipeline.components]
    for skip in skips:
        component, slash, _ = skip.partition("/")
        if slash and component not in names:
            raise UsageError(f"--skip {skip}: there is no component {component}. {nearest(component, names)}")


def _require_matches(plans: Mapping[str, Plan], skips: tuple[str, ...]) -> None:
    """Raise UsageError for a pattern that matches nothing in its component or, without one, in any; also where the
    component is not quantized."""
    for skip in skips:
        component, slash, pattern = skip.partition("/")
        asked = plans
        if not slash:
            pattern = skip
        elif component in plans:
            asked = {component: plans[component]}
        else:
            raise UsageError(f"--skip {skip}: {component} is not quantized anyway. Leave this --skip out.")
        if asked and all(pattern in plan.architecture.unmatched_skips for plan in asked.values()):
            refuse_unmatched([pattern], " or ".join(asked), asked.values(), component + slash if slash else "")


def _plan(choice: Choice, settings: Settings) -> Plan:
    checkpoint = choice.component.checkpoint
    assert checkpoint is not None  # ``choose`` takes components with weights only
    try:
        return plan_quantization(checkpoint, settings, Membership(choice.name, whole_pipeline=True))
    except Unsupported as error:
        if not choice.asked_for:
            raise
        raise Unsupported(f"{error} Or leave it as it is: --component {choice.name}=none.") from error
