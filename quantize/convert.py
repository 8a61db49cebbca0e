"""Quantize a checkpoint: plan it, stream it into a staging area, commit it, and sum it up."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qz import QzError, Unsupported, UsageError
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.folder import Folder
from qz.formats.local_folder import LocalFolder
from qz.formats.output.companions import Companion, companions, terms
from qz.formats.output.damaged import require_undamaged
from qz.formats.output.recorded.record import read_record
from qz.progress import OnProgress, ignore
from qz.quantize.command import command
from qz.quantize.compute import backends
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.consumers.planned import loads_in
from qz.quantize.importance.refine import refinement
from qz.quantize.importance.score_file import score_file
from qz.quantize.libraries.architecture import LoadRequest, TensorSpec
from qz.quantize.libraries.examine import examine, library_versions
from qz.quantize.libraries.importing.lean_imports import gc_paused
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.planning.budget.kept_layers import with_kept_layers
from qz.quantize.planning.dequantization import dequantized_checkpoint
from qz.quantize.planning.fusing import fuse
from qz.quantize.planning.membership import ALONE, Membership
from qz.quantize.planning.nearest import refuse_unmatched
from qz.quantize.planning.original_layout import in_original_names
from qz.quantize.planning.plan import Plan, make_plan
from qz.quantize.planning.sources import Source as TensorSource
from qz.quantize.planning.unquantized import equal_sources, is_bitsandbytes, refuse_quantized
from qz.quantize.quantizing_device import arithmetic_for
from qz.quantize.reports.summary import Source, Summary, summarize
from qz.quantize.settings import Settings
from qz.quantize.source_identity import identity, recorded_identity
from qz.quantize.streaming.discard import DiscardOutput
from qz.quantize.streaming.measuring.measure import Measure
from qz.quantize.streaming.output_parts import Target, model_part, write_parts
from qz.quantize.streaming.run import Run
from qz.quantize.up_to_date import settings_fingerprint

TRANSIENT = ("output", "dry_run", "seconds", "shards", "resumed", "up_to_date", "nonfinite")
"""Of a summary, what differs from run to run."""


def plan_quantization(checkpoint: Checkpoint, settings: Settings, member: Membership = ALONE) -> Plan:
    """The plan of a plain checkpoint, or of one that bitsandbytes quantized if LoRAs are fused into it.

    Raises Unsupported if it is quantized already, cannot be, or nothing of it would be; UsageError if
    ``settings.skips`` leave nothing, or one of them matches nothing (in a whole pipeline it may match elsewhere).
    """
    plan = plan_conversion(checkpoint, settings, member)
    if not plan.quantized:
        raise _nothing_to_quantize(plan)
    return in_original_names(plan) if settings.layout == "single-file" else plan


def plan_conversion(checkpoint: Checkpoint, settings: Settings, member: Membership = ALONE) -> Plan:
    """As ``plan_quantization``, also where no layer can be quantized."""
    checkpoint = plain_checkpoint(checkpoint)
    if settings.experts and checkpoint.library != "transformers":
        raise UsageError(f"{checkpoint.folder.location} is a model of {checkpoint.library}: leave out --experts.")
    request = LoadRequest(settings.method, settings.dtype, settings.skips, settings.default_skips, settings.experts)
    sources: dict[str, TensorSource] | None = None
    given: dict[str, TensorSpec] | None = None
    if settings.loras and is_bitsandbytes(checkpoint):
        sources, given, before = dequantized_checkpoint(checkpoint)
        request = replace(request, dtype=before if request.dtype == "auto" else request.dtype)
    else:
        refuse_quantized(checkpoint)

    def equal(one: str, other: str) -> bool:
        return equal_sources(checkpoint, sources, one, other)

    def planned(request: LoadRequest) -> Plan:
        with gc_paused():  # a plan stays, and large ones are a million objects
            architecture = examine(checkpoint, request, given, equal)
            plan = make_plan(checkpoint, architecture, settings.method, settings.max_shard_bytes, sources)
        return fuse(plan, settings.loras, member)

    plan = planned(request)
    if not member.whole_pipeline:
        refuse_unmatched(plan.architecture.unmatched_skips, checkpoint.folder.location, [plan])
    if settings.keep_nonfinite and (modules := nonfinite_modules(plan, settings)):
        request = replace(request, skips=(*request.skips, *modules))
        plan = planned(request)
    if settings.chooses_layers and plan.quantized:
        again = lambda paths: planned(replace(request, skips=(*request.skips, *paths)))  # noqa: E731
        plan = with_kept_layers(plan, settings, again, score_file(settings, member))
    return replace(plan, refinement=refinement(plan, settings, member))


def _nothing_to_quantize(plan: Plan) -> QzError:
    where, name = plan.checkpoint.folder.location, plan.architecture.class_name
    kept = Counter(plan.architecture.kept_linears.values())
    if kept["skipped on request"]:
        return UsageError(f"{where}: with these --skip nothing of {name} is left to quantize. Leave some of them out.")
    why = ", ".join(f"{count} {reason}" for reason, count in kept.most_common(3))
    found = f"each of its linear layers stays as it is ({why})" if kept else "it has no linear layer"
    return Unsupported(
        f"{where}: nothing of {name} can be quantized: {found}, and bitsandbytes quantizes no other. Use the model as "
        "it is; loaded in a 16-bit dtype it takes half the memory of float32."
    )


def nonfinite_modules(plan: Plan, settings: Settings) -> list[str]:
    """Paths of the linears whose weight cannot be quantized, found by reading the whole source once."""
    from qz.quantize.compute.devices import arithmetic_on

    arithmetic = arithmetic_on(settings.device)
    run = Run(plan, plan.checkpoint.folder, DiscardOutput(), arithmetic, allow_nonfinite=True)
    run.convert(settings.threads or arithmetic.threads)
    return sorted(weight.removesuffix(".weight") for weight in run.nonfinite)


def companion_files(checkpoint: Checkpoint, root: Folder, settings: Settings) -> tuple[Companion, ...]:
    """What is copied beside the converted weights, so that the output works wherever the original did.

    ``root`` is the repository, if ``checkpoint`` lies in a folder of it: its licence covers that folder too. Raises
    Malformed for files that would be copied damaged.
    """
    if settings.weights_only or root.named_file is not None:
        return ()
    found = companions(checkpoint.folder)
    names = {each.name for each in found}
    carried = (*found, *(each for each in terms(root) if each.name not in names))
    require_undamaged(carried)
    return carried


def carry_out(
    plan: Plan,
    source: Source,
    target: Target,
    settings: Settings,
    progress: OnProgress = ignore,
    carried: tuple[Companion, ...] = (),
    measure: Measure | None = None,
    arithmetic: Arithmetic | None = None,
) -> Summary:
    """Write what the plan says, and ``carried`` beside it. Afterwards the output is complete and checked, or absent.

    ``measure`` is shown what is computed, and its loss becomes part of the summary. ``arithmetic`` is that of the
    settings' device unless given.

    Raises what reading, computing and writing raise; finished shards stay for the next run with the same settings.
    """
    begun = time.monotonic()
    folder = plan.checkpoint.folder
    arithmetic = arithmetic or arithmetic_for([plan], settings, measured=measure is not None)
    part = model_part(plan, carried, measure=measure)
    summary = replace(
        summarize(plan, source, target.place, device=arithmetic.name, carried=part.carried),
        bytes_of=arithmetic.bytes_of,
    )
    written = write_parts(
        [part],
        [folder, *(measure.folders if measure else ())],
        target,
        arithmetic,
        settings.threads or arithmetic.threads,
        fingerprint=fingerprint(identity({"": folder}, part.carried), settings, arithmetic),
        about={
            **about(summary.as_json(), {"": folder}, part.carried, source.location, settings),
            "loads_in": loads_in(plan),
        },
        measured=lambda: {"loss": measure.loss().recorded()} if measure else {},
        progress=progress,
    )
    done = summarize(
        plan,
        source,
        target.place,
        device=arithmetic.name,
        written=written.files,
        carried=part.carried,
        seconds=time.monotonic() - begun,
        resumed=written.resumed,
        nonfinite=written.nonfinite[part.name],
        loss=measure.loss() if measure else None,
    )
    notes = (*done.notes, *arithmetic.notes, *backends.notes(), *written.notes)
    return replace(
        done, notes=notes, bytes_of=arithmetic.bytes_of, pushed=written.pushed, bytes_read=written.bytes_read
    )


def fingerprint(source: dict[str, Any], settings: Settings, arithmetic: Arithmetic) -> dict[str, Any]:
    """What must be the same for a resumed run to write the same bytes. Threads are not part of it."""
    from qz import __version__

    versions = {"qz": __version__, **library_versions()}
    device = f"{arithmetic.name} ({arithmetic.model})" if arithmetic.model else arithmetic.name
    if arithmetic.name == "cpu" != arithmetic.bytes_of:
        device = f"cpu, as {arithmetic.bytes_of}"
    return {"source": source, "settings": settings_fingerprint(settings), "versions": versions, "device": device}


def hub_origin(folder: Folder) -> dict[str, Any] | None:
    """The repository that a folder which qz wrote comes from in the end: whose license it has, and who may see it.

    Raises Malformed for a damaged record: without an origin, what is private could be made public.
    """
    record = read_record(folder)
    if record is None:
        return None
    origin, source = record.about.get("origin"), record.about.get("source")
    if isinstance(origin, dict):
        return origin
    return source if isinstance(source, dict) and source.get("revision") else None


def about(
    summary: dict[str, Any],
    folders: Mapping[str, Folder],
    carried: Iterable[Companion],
    location: str,
    settings: Settings,
) -> dict[str, Any]:
    """What the record in the output says of how it was made; nothing private, so no local path."""
    from qz import __version__

    folder = folders[""]
    told = {key: value for key, value in summary.items() if key not in TRANSIENT}
    if isinstance(folder, LocalFolder):
        told["source"] = {**told["source"], "location": os.path.basename(os.path.realpath(location))}
        if (origin := hub_origin(folder)) is not None:
            told["origin"] = origin
    told["command"] = command(told["act"], told["source"], settings)
    made_from = {"identity": recorded_identity(folders, carried), "settings": settings_fingerprint(settings)}
    return {"qz": __version__, "versions": library_versions(), **told, **made_from}
