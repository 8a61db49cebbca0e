"""Carry out what is planned for a model: streamed into a staging area, committed, and summed up."""

from __future__ import annotations

import time
from dataclasses import replace

from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.folder import Folder
from qz.formats.output.companions import Companion, companions, terms
from qz.formats.output.damaged import require_undamaged
from qz.progress import OnProgress, ignore
from qz.quantize.compute import backends
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.consumers.planned import loads_in
from qz.quantize.libraries.companions.notes import notes_on_model
from qz.quantize.planning.plan import Plan
from qz.quantize.provenance.about import about
from qz.quantize.provenance.fingerprints import fingerprint
from qz.quantize.provenance.source_identity import identity
from qz.quantize.reports.summary import Source, Summary, summarize
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.measure import Measure
from qz.quantize.streaming.output.output_folders import Target, model_folder, write_folders
from qz.quantize.streaming.quantizing_device import arithmetic_for


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
    notes = notes_on_model(carried, checkpoint.config)
    return tuple(
        replace(each, notes=tuple(note.as_text() for note in notes if note.where == each.name)) for each in carried
    )


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
    made = model_folder(plan, carried, measure=measure)
    summary = replace(
        summarize(plan, source, target.place, device=arithmetic.name, carried=made.carried),
        bytes_of=arithmetic.bytes_of,
    )
    written = write_folders(
        [made],
        [folder, *(measure.folders if measure else ())],
        target,
        arithmetic,
        settings.threads or arithmetic.threads,
        fingerprint=fingerprint(identity({"": folder}, made.carried), settings, arithmetic),
        about={
            **about(summary.as_json(), {"": folder}, made.carried, source.location, settings),
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
        carried=made.carried,
        seconds=time.monotonic() - begun,
        resumed=written.resumed,
        nonfinite=written.nonfinite[made.name],
        loss=measure.loss() if measure else None,
    )
    notes = (*done.notes, *arithmetic.notes, *backends.notes(), *written.notes)
    return replace(
        done, notes=notes, bytes_of=arithmetic.bytes_of, pushed=written.pushed, bytes_read=written.bytes_read
    )
