"""Whole pipelines: what was planned is carried out under one commit, and summed up in one report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qz.formats.checkpoint.pipeline import Component, has_weights
from qz.formats.files.folder import PIPELINE_INDEX, Folder
from qz.formats.output import companions
from qz.formats.output.recorded.record import WrittenFile
from qz.progress import OnProgress, ignore
from qz.quantize.compute import backends
from qz.quantize.libraries.diffusers.component_classes import class_notes
from qz.quantize.pipelines.plan import PipelinePlan
from qz.quantize.planning.components import Choice
from qz.quantize.planning.plan import Plan
from qz.quantize.planning.unreadable import KEPT
from qz.quantize.provenance.about import about
from qz.quantize.provenance.fingerprints import fingerprint
from qz.quantize.provenance.source_identity import identity
from qz.quantize.reports.pipeline_summary import ComponentSummary, PipelineSummary
from qz.quantize.reports.summary import Source, Summary, code_left_out, fused_weights, made_from, summarize
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.loss import Loss, joined
from qz.quantize.streaming.measuring.not_finite import NotFinite
from qz.quantize.streaming.output.output_folders import OutputFolder, Target, write_folders
from qz.quantize.streaming.quantizing_device import arithmetic_for


def carry_out_pipeline(
    plan: PipelinePlan,
    source: Source,
    target: Target,
    settings: Settings,
    progress: OnProgress = ignore,
) -> PipelineSummary:
    """Write the whole pipeline under one commit; see ``qz.quantize.models.run.carry_out``."""
    begun = time.monotonic()
    arithmetic = arithmetic_for(plan.plans.values(), settings, measured=bool(plan.measures))
    sources = [each for each in (plan.pipeline.folder, plan.pipeline.file_folder) if each is not None]
    planned = replace(
        summarize_pipeline(plan, source, target.place, device=arithmetic.name), bytes_of=arithmetic.bytes_of
    )
    written = write_folders(
        plan.output_folders,
        sources,
        target,
        arithmetic,
        settings.threads or arithmetic.threads,
        fingerprint=fingerprint(identity(plan.source_folders, plan.carried), settings, arithmetic),
        about=about(planned.as_json(), plan.source_folders, plan.carried, source.location, settings),
        measured=lambda: recorded_losses(planned, plan.losses()),
        progress=progress,
    )
    done = summarize_pipeline(
        plan,
        source,
        target.place,
        device=arithmetic.name,
        written=written.files,
        seconds=time.monotonic() - begun,
        resumed=written.resumed,
        nonfinite=written.nonfinite,
        losses=plan.losses(),
    )
    notes = (*done.notes, *arithmetic.notes, *backends.notes(), *written.notes)
    return replace(
        done, notes=notes, bytes_of=arithmetic.bytes_of, pushed=written.pushed, bytes_read=written.bytes_read
    )


def recorded_losses(planned: PipelineSummary, losses: Mapping[str, Loss]) -> dict[str, Any]:
    """What the record says once the loss is known: that of each component, and of all together."""
    if not losses:
        return {}
    told = {name: loss.recorded() for name, loss in losses.items()}
    components = [{**each, "loss": told.get(each["name"])} for each in planned.as_json()["components"]]
    return {"loss": joined(losses).recorded(), "components": components}


def summarize_pipeline(
    plan: PipelinePlan,
    source: Source,
    output: str,
    *,
    device: str,
    written: tuple[WrittenFile, ...] = (),
    seconds: float = 0.0,
    resumed: bool = False,
    nonfinite: Mapping[str, Mapping[str, NotFinite]] | None = None,
    losses: Mapping[str, Loss] | None = None,
) -> PipelineSummary:
    """Sum the plan up; ``written`` are the files of a finished run, none for a dry run. By component: ``nonfinite``,
    ``losses``.
    """
    folders = {folder.name: folder for folder in plan.output_folders}
    whole = plan.pipeline.file_folder is None  # otherwise the folder is not the source, but that of the configs
    models = {
        name: summarize(
            folder.plan,
            _source_of(folder.plan, name, source),
            "",
            device=device,
            written=_files_inside(folder, written),
            carried=folder.carried,
            nonfinite=(nonfinite or {}).get(name),
            loss=(losses or {}).get(name),
        )
        for name, folder in folders.items()
        if folder.plan is not None
    }
    shards = tuple(file for file in written if file.name.endswith(".safetensors"))
    used = {*(each.name for each in folders[""].carried), *folders}
    of_root = companions.left_out(plan.pipeline.folder, used) if whole else ()
    return PipelineSummary(
        source=source,
        output=output,
        device=device,
        dry_run=not written,
        components=tuple(_component(plan, each, folders[each.name], models.get(each.name)) for each in plan.choices),
        carried=tuple(folder.prefix + each.name for folder in folders.values() for each in folder.carried),
        bytes_all=sum(file.bytes for file in written) or sum(folder.bytes_output for folder in folders.values()),
        shards=shards or _planned_shards(folders.values()),
        seconds=seconds,
        resumed=resumed,
        notes=_notes(plan, of_root),
        lacking=plan.pipeline.lacking,
        left_out_of_root=of_root,
        loras=_fused_loras(plan),
        combinations=plan.combinations,
        kept_layers=plan.kept_layers,
    )


def _source_of(plan: Plan, component: str, pipeline: Source) -> Source:
    """What a component is made from."""
    library, architecture = plan.checkpoint.library, plan.architecture.class_name
    return replace(pipeline, subfolder=component, library=library, architecture=architecture)


def _component(plan: PipelinePlan, choice: Choice, folder: OutputFolder, made: Summary | None) -> ComponentSummary:
    """A component's row; ``made``: the report of its model, if that is written anew."""
    component, model = choice.component, choice.component.checkpoint
    whole = plan.pipeline.file_folder is None
    return ComponentSummary(
        name=choice.name,
        library=model.library if model else component.library,
        architecture=model.architecture if model else component.class_name,
        reason=choice.reason,
        parameters=component.parameters,
        bytes=component.bytes,
        footprint=plan.kept[choice.name].before if choice.name in plan.kept else 0,
        model=made if choice.name not in plan.casts else None,
        cast=made if choice.name in plan.casts else None,
        left_out=companions.left_out(component.folder, used_files(component, folder)) if whole else (),
    )


def _files_inside(folder: OutputFolder, written: Iterable[WrittenFile]) -> list[WrittenFile]:
    """The written files of a folder, by their names in it."""
    inside = f"{folder.name}/"
    return [replace(file, name=file.name.removeprefix(inside)) for file in written if file.name.startswith(inside)]


def _notes(plan: PipelinePlan, left_out: Iterable[str]) -> tuple[str, ...]:
    """What the user should know. ``left_out``: names in the source's root that are not in the output."""
    copied = {folder.name: folder for folder in plan.output_folders if folder.plan is None}
    kept = [choice.component.checkpoint for choice in plan.choices if choice.name in copied]
    strays = [name for name in left_out if name.endswith("/") and _holds_a_model(plan.pipeline.folder, name)]
    return (
        *plan.pipeline.notes,
        *plan.notes,
        *class_notes(plan.pipeline.class_name, plan.pipeline.classes),
        *(text for checkpoint in kept if checkpoint is not None for text in checkpoint.choices),
        *(f"{choice.name} is {choice.reason}" for choice in plan.choices if choice.reason.startswith(KEPT)),
        *(text for folder in copied.values() for text in code_left_out(folder.carried, folder.prefix)),
        *(f"{name} holds a model that {PIPELINE_INDEX} does not name; it was left out" for name in strays),
    )


def _fused_loras(plan: PipelinePlan) -> tuple[Mapping[str, Any], ...]:
    every = [*plan.plans.values(), *plan.casts.values()]
    return tuple(
        {**adapter.as_json(), "weights": sum(fused_weights(each, adapter) for each in every)}
        for adapter in plan.adapters
    )


def used_files(component: Component, folder: OutputFolder) -> set[str]:
    """Names of the component's files that are in the output, as they are or in what was made of them."""
    used = {
        name for each in folder.carried for name in (each.name, each.file if each.folder is component.folder else "")
    }
    return used | (made_from(component.checkpoint) if component.checkpoint is not None else set())


def _holds_a_model(root: Folder, name: str) -> bool:
    return has_weights(root.subfolder(name.rstrip("/")).sizes())


def _planned_shards(folders: Iterable[OutputFolder]) -> tuple[WrittenFile, ...]:
    shards: list[WrittenFile] = []
    for folder in folders:
        files = [(layout.file, layout.size) for layout in folder.plan.shards] if folder.plan is not None else []
        files += [(each.name, each.bytes) for each in folder.carried if each.name.endswith(".safetensors")]
        shards += [WrittenFile(f"{folder.name}/{name}", nbytes, "") for name, nbytes in files]
    return tuple(shards)
