"""One conversion, from an opened source to a finished output: what quantizing and dequantizing have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qz.formats.malformed import Malformed
from qz.formats.output.preflight import check_interrupted, check_output, check_room
from qz.formats.output.shares import refuse_linked
from qz.formats.output.storage.beside import JOURNAL, sibling
from qz.formats.output.storage.disk import Disk
from qz.formats.source import OpenedSource, default_output, download
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.libraries.importing.lean_imports import gc_paused
from qz.quantize.methods import FourBit
from qz.quantize.provenance.source_identity import identity
from qz.quantize.provenance.up_to_date import UpToDate, up_to_date
from qz.quantize.reports.summary import Source, Summary
from qz.quantize.settings import IfExists, Settings
from qz.quantize.streaming.output import shares
from qz.quantize.streaming.output.output_folders import (
    Target,
    asked_for,
    model_folder,
    resumable,
    staged_bytes,
    weights_of,
)

if TYPE_CHECKING:
    from qz.formats.checkpoint.pipeline import Pipeline
    from qz.formats.checkpoint.survey import Checkpoint
    from qz.formats.files.folder import Folder
    from qz.formats.output.companions import Companion
    from qz.formats.output.shares import Share
    from qz.formats.publish.publication import Publication
    from qz.quantize.pipelines.plan import PipelinePlan
    from qz.quantize.planning.membership import Membership
    from qz.quantize.planning.plan import Plan
    from qz.quantize.reports.pipeline_summary import PipelineSummary
    from qz.quantize.streaming.measuring.measure import Measure
    from qz.quantize.streaming.output.output_folders import OutputFolder

    PlanModel = Callable[[Checkpoint, Settings, Membership], Plan]
    MeasureModel = Callable[[Checkpoint], Measure]
    PlanPipeline = Callable[[Pipeline, Settings], PipelinePlan]

UNMEASURED = "the loss was not measured when this output was made; `qz compare` measures it without making it again"

S = TypeVar("S", "Summary", "PipelineSummary")
Report = Summary | UpToDate
"""What came of converting a model."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A source, and how to convert it. ``output`` None: named after the source and the dtype that comes out."""

    source: OpenedSource
    settings: Settings
    output: Path | None
    if_exists: IfExists = "error"
    resume: bool = True
    disk: Disk = field(default_factory=Disk)
    download: bool = False
    dry_run: bool = False
    on_progress: OnProgress = ignore
    publication: Publication | None = None
    """Where the output goes instead of staying here."""
    share: Share | None = None
    """Which part of the output is made, if not all of it."""
    measured: bool = False
    """Whether the loss is asked for."""

    def model(self, plan: PlanModel, measure: MeasureModel | None = None) -> Report:
        """Convert one model as ``plan`` plans it; ``measure`` makes what measures the loss on the way."""
        from qz.formats.checkpoint.survey import open_checkpoint

        if (found := self._existing()) is not None:
            return found
        self._begin()
        with gc_paused():  # what is read from headers stays in use
            checkpoint = open_checkpoint(self.source.folder, self.settings.variant)
        return self._model(checkpoint, plan, measure)

    def file(
        self,
        plan: PlanModel,
        plan_pipeline: PlanPipeline,
        measure: MeasureModel | None,
        require: Callable[[bool], None],
    ) -> Report | PipelineSummary:
        """Convert what one file in other names holds; ``require`` is told whether that is a pipeline, and may raise."""
        from qz.formats.checkpoint.pipeline import Pipeline

        if (found := self._existing()) is not None:
            return found
        self._begin()
        opened, notes = open_file(self.source, self.settings)
        done: Report | PipelineSummary
        if isinstance(opened, Pipeline):
            require(True)
            done = self._pipeline(opened, plan_pipeline)
        else:
            require(False)
            done = self._model(opened, plan, measure)
        return replace(done, notes=(*done.notes, *notes))

    def _model(self, checkpoint: Checkpoint, plan: PlanModel, measure: MeasureModel | None) -> Report:
        from qz.quantize.models.run import carry_out
        from qz.quantize.reports.summary import summarize

        self._download([checkpoint])
        self.on_progress(Progress("Planning"))
        planned = plan(checkpoint, self.settings, membership_of(self.source, self.settings))
        target = self._target([planned.architecture.dtype])
        if self.output is None and (found := self._existing(target.output)) is not None:
            return found
        measuring = measure(checkpoint) if measure is not None else None
        if measuring is not None:
            measuring.check(planned)
        made = planned.architecture
        origin = replace(self._origin(checkpoint.library, made.class_name), module=made.class_module)
        carried = companions_of(self.source, checkpoint, self.settings)
        if self.dry_run:
            folder = model_folder(planned, carried, measure=measuring)
            resumed = self._rehearse(target, [folder], identity({"": self.source.folder}, folder.carried))
            loss = measuring.alone(planned, self.settings) if measuring else None
            place, device = target.place, self.settings.device
            summary = summarize(planned, origin, place, device=device, carried=carried, resumed=resumed, loss=loss)
            return as_share(summary, [folder], self.share)
        done = carry_out(planned, origin, target, self.settings, self.on_progress, carried, measuring)
        return replace(done, share=self.share)

    def pipeline(self, plan: PlanPipeline) -> PipelineSummary | UpToDate:
        """Convert a diffusers pipeline, component by component, as ``plan`` plans it."""
        from qz.formats.checkpoint.pipeline import open_pipeline

        if (found := self._existing()) is not None:
            return found
        self._begin()
        with gc_paused():
            pipeline = open_pipeline(self.source.folder, self.settings.variant)
        return self._pipeline(pipeline, plan)

    def _pipeline(self, pipeline: Pipeline, plan: PlanPipeline) -> PipelineSummary | UpToDate:
        from qz.quantize.pipelines.run import carry_out_pipeline, summarize_pipeline

        try:
            self._download([each.checkpoint for each in pipeline.components if each.checkpoint])
            self.on_progress(Progress("Planning"))
            planned = plan(pipeline, self.settings)
            target = self._target(each.architecture.dtype for each in planned.plans.values())
            if self.output is None and (found := self._existing(target.output)) is not None:
                return found
            origin = self._origin("diffusers", pipeline.class_name)
            if self.dry_run:
                resumed = self._rehearse(
                    target, planned.output_folders, identity(planned.source_folders, planned.carried)
                )
                device = self.settings.device
                losses = {
                    name: each.alone(planned.plans[name], self.settings) for name, each in planned.measures.items()
                }
                summary = summarize_pipeline(
                    planned, origin, target.place, device=device, resumed=resumed, losses=losses
                )
                return as_share(summary, planned.output_folders, self.share)
            done = carry_out_pipeline(planned, origin, target, self.settings, self.on_progress)
            return replace(done, share=self.share)
        finally:
            pipeline.close()

    def _origin(self, library: str, architecture: str) -> Source:
        commit = self.source.folder.identity().get("commit")
        pipeline = self._pipeline_around()
        return Source(self.source.location, commit, self.source.subfolder, library, architecture, pipeline=pipeline)

    def _pipeline_around(self) -> str | None:
        """The class of the pipeline that the source is a component of."""
        from qz.formats.checkpoint.pipeline import pipeline_class

        name = None
        if self.source.subfolder:
            with suppress(Malformed):  # nothing else is read from it
                name = pipeline_class(self.source.root)
        return name if name and name.isidentifier() and name.isascii() else None

    def _existing(self, output: Path | None = None) -> UpToDate | None:
        """The existing output, if nothing is left to do; raises OutputRefused if it may not be replaced.

        A dry run looks as well, so that it refuses what the run would refuse.
        """
        output = output or self.output
        if output is None or self.publication is not None:
            return None
        if self.if_exists == "skip":
            record = up_to_date(output, self.source.folder, self.settings)
            if record is not None:
                unknown = self.measured and record.about.get("loss") is None
                return UpToDate(record, output, self.source.location, notes=(UNMEASURED,) if unknown else ())
        check_output(output, self.if_exists == "overwrite", [self.source.root], self.disk)
        return None

    def _rehearse(self, target: Target, folders: Sequence[OutputFolder], source: dict[str, Any]) -> bool:
        """Raise, in a dry run, what the run would raise after planning. Returns whether it would continue another one.

        ``source``: the identity of what is read.
        """
        from qz.quantize.compute.devices import arithmetic_on
        from qz.quantize.provenance.fingerprints import fingerprint
        from qz.quantize.streaming.quantizing_device import arithmetic_for

        if target.share is not None:
            refuse_linked(target.output, target.disk)
        check_room(target.staged, staged_bytes(folders, target), target.disk)
        if target.publication is not None:
            check_output(target.staged, target.share is not None, (), target.disk)
            target.publication.check(weights_of(folders))
        places = [sibling(target.staged, JOURNAL), *([target.folder] if target.share is not None else [])]
        left = target.resume and any(target.disk.status(place) is not None for place in places)
        if not left:
            if self.settings.device not in ("auto", "cpu"):
                arithmetic_on(self.settings.device)  # raises if the device does not exist
            return False
        measured = any(folder.measure is not None for folder in folders)
        plans = [folder.plan for folder in folders if folder.plan is not None]
        arithmetic = arithmetic_for(plans, self.settings, measured=measured)
        asked = asked_for(target, fingerprint(source, self.settings, arithmetic))
        if shares.made_before(target, asked) is not None:
            return True
        elsewhere = shares.elsewhere(shares.owners_of(folders, target.share), target.share)
        return check_interrupted(target.staged, asked, target.disk, resumable(folders, elsewhere))

    def _begin(self) -> None:
        """Say what is done, and import what will compute while headers are read."""
        from qz.quantize.compute import backends
        from qz.quantize.libraries import process
        from qz.quantize.streaming.quantizing_device import import_torch, prewarm

        self.on_progress(Progress("Reading headers"))
        if not self.dry_run:
            is_4bit = isinstance(self.settings.method, FourBit)
            on_cpu = backends.block_backend if is_4bit else backends.backend
            process.meanwhile(import_torch if prewarm(self.settings) else on_cpu)

    def _target(self, dtypes: Iterable[str]) -> Target:
        names = set(dtypes)
        suffix = names.pop() if len(names) == 1 else "dequantized"
        output = self.output or default_output(self.source.location, self.source.subfolder, suffix)
        return Target(output, self.if_exists == "overwrite", self.resume, self.disk, self.publication, self.share)

    def _download(self, checkpoints: list[Checkpoint]) -> None:
        """Fetch every weight file into the Hub cache, from which it is then read."""
        if not self.download or self.dry_run:
            return
        checkpoints = list({(id(each.folder), each.files): each for each in checkpoints}.values())
        total = sum(each.folder.sizes()[name] for each in checkpoints for name in each.files)
        count = sum(len(each.files) for each in checkpoints)
        done, lock = [0, 0], threading.Lock()

        def arrived(_: str, size: int) -> None:
            with lock:
                done[0], done[1] = done[0] + 1, done[1] + size
                self.on_progress(Progress("Downloading", done[0], count, done[1], total, unit="file"))

        for each in checkpoints:
            download(each.folder, each.files, arrived)


def open_file(source: OpenedSource, settings: Settings) -> tuple[Checkpoint | Pipeline, tuple[str, ...]]:
    """The model or pipeline that the one file of a source holds, and notes on where its config comes from."""
    from qz.formats.output.recorded.promises import hold_to_record
    from qz.formats.source import notes_of, open_source
    from qz.quantize.single_files.open import open_single_file

    assert source.file is not None  # checked by the caller
    configs: list[Folder] = []

    def open_config(named: str) -> Folder:
        configs.append(open_source(named))
        hold_to_record(configs[-1])
        return configs[-1]

    return open_single_file(source.folder, source.file, settings.config, open_config), notes_of(*configs)


def membership_of(source: OpenedSource, settings: Settings) -> Membership:
    """Which component of which pipeline a source is; the pipeline's class is read where a LoRA needs it."""
    from qz.formats.checkpoint.pipeline import pipeline_class
    from qz.quantize.planning.membership import Membership

    component = (source.subfolder or "").strip("/")
    return Membership(component, pipeline_class(source.root) if settings.loras else None)


def companions_of(source: OpenedSource, checkpoint: Checkpoint, settings: Settings) -> tuple[Companion, ...]:
    """What is copied beside the weights: nothing of what lies beside a single file, which belongs to others."""
    from qz.quantize.models.run import companion_files

    return () if source.file is not None else companion_files(checkpoint, source.root, settings)


def as_share(summary: S, folders: Sequence[OutputFolder], share: Share | None) -> S:
    """The report of a dry run with only those weight files that the part makes; all of them without ``share``."""
    own = shares.shards_of(folders, share)
    kept = tuple(shard for shard in summary.shards if own is None or shard.name.lstrip("/") in own)
    made = replace(summary, shards=kept, share=share)
    if share is not None and isinstance(made, Summary):
        made = replace(made, bytes_output=sum(shard.bytes for shard in kept))
    return made
