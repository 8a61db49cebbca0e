"""Put LoRAs into a plan: the tensors that they change are read through them, and all else stays as it was planned."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from qz import MalformedInput, Unsupported
from qz.counted import shown
from qz.formats.checkpoint.adapter_file import AdapterFile
from qz.formats.malformed import quoted
from qz.quantize.adapters.changes import Change, Piece, delta_shape, matrix_shape
from qz.quantize.adapters.modules import AdapterModule
from qz.quantize.adapters.placement import Placement, placements, spellings
from qz.quantize.compute.arrays import NUMPY
from qz.quantize.planning.membership import ALONE, Membership
from qz.quantize.planning.plan import Plan, Step
from qz.quantize.planning.sources import Composed, Fused, Source

What = Literal["weight", "bias", "bias of B", "replace"]


def fuse(plan: Plan, adapters: Sequence[AdapterFile], member: Membership = ALONE) -> Plan:
    """The plan of one model with LoRAs fused into it; as it is in a whole pipeline, which fuses them itself.

    Raises MalformedInput for tensors of a LoRA that belong nowhere or have another shape, and Unsupported for weights
    that a LoRA cannot be fused into.
    """
    if not adapters or member.whole_pipeline:
        return plan
    name = member.component or ("transformer" if plan.checkpoint.library == "diffusers" else "")
    models = {name: plan.checkpoint}
    placed = [each for adapter in adapters for each in placements(adapter, models, member.pipeline_class)]
    return fused(plan, placed, adapters)


def fused(plan: Plan, placed: Iterable[Placement], adapters: Sequence[AdapterFile]) -> Plan:
    """The plan with every one of ``placed`` in it, which are all of this model."""
    by_name = {step.sources[0].name: step for step in plan.steps}
    by_name |= {step.weight.parameter or step.weight.name: step for step in plan.steps}
    by_index = {(step.sources[0].name, step.weight.index): step for step in plan.steps}
    changes: dict[str, list[Change]] = defaultdict(list)
    nowhere: list[tuple[AdapterFile, str]] = []
    for placement in placed:
        for target, what in _targets(placement):
            alone = placement.expert and by_index.get((target, placement.expert.index))
            step = alone or _step(plan, by_name, target)
            if step is None:
                nowhere.append((placement.module.adapter, target))
                continue
            conv1d = target in plan.architecture.conv1d
            changes[step.name].append(_change(placement, step, what, conv1d=conv1d))
    if nowhere:
        adapter = nowhere[0][0]
        names = sorted(quoted(name) for mine, name in nowhere if mine is adapter)
        raise MalformedInput(
            f"{adapter.where} does not fit {plan.architecture.class_name} in {plan.checkpoint.folder.location}: there "
            f"is no {shown(names, 5)}. Is it a LoRA for another model?"
        )
    steps = [
        replace(step, sources=_through(step, changes[step.name])) if step.name in changes else step
        for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps), adapters=tuple(adapters))


def _through(step: Step, changes: list[Change]) -> tuple[Source, ...]:
    """The step's one source with changes on the way."""
    [source] = step.sources
    assert not isinstance(source, Fused | Composed)  # all LoRAs are fused in one pass, before anything is composed
    return (Fused(source, tuple(changes)),)


def _step(plan: Plan, by_name: Mapping[str, Step], name: str) -> Step | None:
    """The step of a parameter, by the model's or the checkpoint's name; Unsupported if it cannot be changed alone."""
    tied = plan.architecture.tied
    if name in tied or name in tied.values():
        other = tied.get(name) or next(mine for mine, kept in tied.items() if kept == name)
        raise Unsupported(
            f"The LoRA changes {quoted(name)}, which is tied to {quoted(other)} in {plan.checkpoint.folder.location}: "
            "fused, both would change. Untie the model (tie_word_embeddings: false, with both weights saved), or leave "
            "that layer out of the LoRA."
        )
    step = next((by_name[each] for each in spellings(name) if each in by_name), None)
    if step is not None and step.weight.index is not None:
        raise Unsupported(
            f"The LoRA changes {quoted(name)} as a whole, which --experts writes expert by expert. Merge the LoRA "
            "with its library, then quantize that, or leave out --experts."
        )
    if step is not None and (step.weight.conversion is not None or len(step.sources) != 1):
        raise Unsupported(
            f"The LoRA changes {quoted(name)}, which {plan.checkpoint.library} computes from several tensors of "
            f"{plan.checkpoint.folder.location}. Merge the LoRA with its library, then quantize that."
        )
    return step


def _targets(placement: Placement) -> list[tuple[str, What]]:
    """The parameters that a placement changes."""
    parts, path = placement.module.parts, placement.path
    if "replacement" in parts:
        return [(path, "replace")]
    if placement.expert is not None:
        return [(path, "weight")]
    found: list[tuple[str, What]] = []
    if placement.module.kind is not None:
        found.append((f"{path}.weight", "weight"))
    if "up_bias" in parts:
        found.append((f"{path}.bias", "bias of B"))
    if "bias_difference" in parts:
        found.append((f"{path}.bias", "bias"))
    return found


def _change(placement: Placement, step: Step, what: What, *, conv1d: bool) -> Change:
    """The change of one tensor, whose shape is compared with it."""
    module, source = placement.module, step.sources[0]
    if source.dtype not in NUMPY:
        raise Unsupported(
            f"{quoted(source.name)} is stored as {source.dtype}; a LoRA is fused into float32, float16 and bfloat16 "
            "only."
        )
    shape = source.shape or (1,)
    rows, columns = matrix_shape(shape, experts=placement.expert is not None)
    transposed = what == "weight" and (("embedding_down" in module.parts) or (conv1d and module.kind == "LoRA"))
    own = _own_shape(module, what)
    if transposed:
        own = own[::-1]
    pieces = placement.pieces or (Piece(0, 0, own[0]),)
    if placement.expert is not None:
        own = own[::-1] if placement.expert.transposed else own
        begin = placement.expert.index * shape[1] if len(shape) == 3 else 0
        pieces = tuple(replace(each, start=begin + each.start) for each in pieces)
    fits = own[1] == columns and all(
        each.start + each.count <= rows and each.first + each.count <= own[0] for each in pieces
    )
    if not fits or (placement.pieces is None and own[0] != rows) or (transposed and placement.pieces is not None):
        raise MalformedInput(
            f"{module.adapter.where}: {quoted(module.stem)} has a change of the shape {list(own)}, but "
            f"{quoted(source.name)} of the model is {list(source.shape)}. Is it a LoRA for another model?"
        )
    axis = _axis(module, own, source.shape, conv1d=conv1d) if what == "weight" else None
    if axis == "columns" and not sum(each.count for each in pieces) == own[0] == rows:
        raise Unsupported(
            f"{module.adapter.where}: {quoted(module.stem)} sets the norms of inputs of a layer that "
            f"{quoted(source.name)} is a part of, and those of the whole are not known. Merge it with the program that "
            "trained it, then quantize that."
        )
    weighed = axis is not None and "dora_scale" in module.parts
    strength = module.adapter.scale if weighed else 1.0
    scale = placement.scale / strength
    return Change(module, scale, pieces, what, transposed, axis, strength, placement.expert)


def _own_shape(module: AdapterModule, what: What) -> tuple[int, int]:
    if what == "weight":
        return delta_shape(module)
    part = {"bias": "bias_difference", "bias of B": "up_bias", "replace": "replacement"}[what]
    shape = module.parts[part].shape or (1,)
    return shape[0], math.prod(shape[1:])


def _axis(
    module: AdapterModule, own: tuple[int, int], shape: tuple[int, ...], *, conv1d: bool
) -> Literal["rows", "columns"] | None:
    """Of which norms a DoRA states the magnitudes: PEFT's are of outputs, LyCORIS' (out, 1 …) or of inputs (1, in …).

    ``own``: of the module's change; ``shape``: of the weight.
    """
    outputs, inputs = own[::-1] if conv1d else own
    if (magnitude := module.parts.get("magnitude")) is not None:
        if math.prod(magnitude.shape) == outputs:
            return "columns" if conv1d else "rows"
    elif (magnitude := module.parts.get("dora_scale")) is not None and not conv1d:
        first, *rest = magnitude.shape or (1,)
        inputs = shape[1] if len(shape) > 1 else 1
        if first == outputs and math.prod(tuple(rest)) == 1:
            return "rows"
        if first == 1 and rest[:1] == [inputs] and math.prod(tuple(rest)) == inputs:
            return "columns"
    else:
        return None
    raise MalformedInput(
        f"{module.adapter.where}: the magnitudes of {quoted(module.stem)} have the shape {list(magnitude.shape)}, "
        f"which fits neither its {outputs} outputs nor its {inputs} inputs. Download the LoRA again."
    )
