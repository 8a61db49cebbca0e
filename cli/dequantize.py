"""``qz dequantize``: from options to a plan, and from its summary to a table or JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.pipeline_report import present_pipeline
from qz.cli.progress import Display
from qz.cli.report import present, present_existing
from qz.cli.transfer import Publishing, fill_cache, publishing

if TYPE_CHECKING:
    from qz.formats.folder import Folder
    from qz.formats.output.disk import Disk
    from qz.formats.publish.destination import PushResult
    from qz.quantize.settings import Settings
    from qz.quantize.streaming.output_parts import Target
    from qz.quantize.summary import Source


def dequantize(
    source: options.SourceArg,
    subfolder: options.SubfolderOpt = None,
    revision: options.RevisionOpt = None,
    variant: options.VariantOpt = None,
    output: options.OutputOpt = None,
    dtype: options.TargetDTypeOpt = "auto",
    max_shard_size: options.MaxShardSizeOpt = options.DEFAULT_SHARD_SIZE,
    weights_only: options.WeightsOnlyOpt = False,
    if_exists: options.IfExistsOpt = "error",
    overwrite: options.OverwriteOpt = False,
    resume: options.ResumeOpt = True,
    fsync: options.FsyncOpt = True,
    device: options.DeviceOpt = "auto",
    threads: options.ThreadsOpt = None,
    download: options.DownloadOpt = False,
    push: options.PushOpt = None,
    public: options.PublicOpt = None,
    against: options.AgainstOpt = None,
    dry_run: options.DryRunOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Turn a model that bitsandbytes quantized back into an ordinary one, streamed, and tell what was lost."""
    from qz import UsageError
    from qz.formats.checkpoint.pipeline import is_pipeline
    from qz.formats.output.disk import Disk
    from qz.formats.output.staging import check_output
    from qz.formats.source import enter, open_source
    from qz.quantize.compute.devices import prewarm_cuda
    from qz.quantize.settings import Settings

    existing = options.existing_output(overwrite, if_exists)
    settings = Settings(
        None,
        dtype,
        max_shard_bytes=max_shard_size,
        device=device,
        threads=threads or 0,
        weights_only=weights_only,
    )
    disk = Disk(durable=fsync)
    if not dry_run:
        prewarm_cuda(device)
    root = open_source(source, None, revision)
    folders: list[Folder] = [root]
    try:
        folder = enter(root, subfolder)
        folders.append(folder)
        if output is not None and existing != "skip" and not dry_run:
            check_output(output, existing == "overwrite", [root], disk)
        publish = publishing(push, public, folder, dry_run=dry_run, quiet=quiet)
        run = Conversion(
            source,
            subfolder,
            root,
            folder,
            output,
            settings,
            variant,
            existing,
            resume,
            disk,
            download and not dry_run,
            publish,
            dry_run,
            quiet,
        )
        if is_pipeline(folder):
            if against is not None:
                raise UsageError("--against compares one model. Name a component with --subfolder, or leave it out.")
            run.pipeline(as_json=as_json)
            return
        original = open_source(against) if against is not None else None
        folders += [original] if original is not None else []
        run.model(original, as_json=as_json)
    finally:
        for opened in folders:
            opened.close()


@dataclass(frozen=True)
class Conversion:
    """A quantized source and where to put what it becomes."""

    source: str
    subfolder: str | None
    root: Folder
    folder: Folder
    output: Path | None
    settings: Settings
    variant: str | None
    existing: options.IfExists
    resume: bool
    disk: Disk
    download: bool
    publish: Publishing | None
    dry_run: bool
    quiet: bool

    def target(self, dtypes: Iterable[str]) -> Target:
        """``output``, or a name made of the source's and the dtype."""
        from qz.formats.source import output_name
        from qz.quantize.streaming.output_parts import Target

        names = set(dtypes)
        suffix = names.pop() if len(names) == 1 else "dequantized"
        output = self.output or Path(output_name(self.source, self.subfolder, suffix))
        return Target(output, self.existing == "overwrite", self.resume, self.disk)

    def origin(self, library: str, architecture: str) -> Source:
        from qz.quantize.summary import Source

        return Source(self.source, self.folder.identity().get("commit"), self.subfolder, library, architecture)

    def done(self, target: Target, *, as_json: bool) -> bool:
        """Whether the output is there already, as ``--if-exists skip`` asks; then it is reported."""
        from qz.quantize.up_to_date import up_to_date

        if self.existing != "skip" or self.dry_run:
            return False
        record = up_to_date(target.output, self.folder, self.settings)
        if record is not None:
            present_existing(record, target.output, self.source, as_json=as_json, pushed=self.pushed(target))
        return record is not None

    def pushed(self, target: Target) -> PushResult | None:
        """What came of ``--push``."""
        return self.publish(target.output) if self.publish else None

    def model(self, original: Folder | None, *, as_json: bool) -> None:
        """One model, compared with its ``original`` if that is given."""
        from qz.formats.checkpoint.survey import open_checkpoint
        from qz.quantize.convert import carry_out, companion_files
        from qz.quantize.planning.dequantization import plan_dequantization
        from qz.quantize.streaming.measure import AgainstOriginal, original_checkpoint
        from qz.quantize.summary import summarize

        checkpoint = open_checkpoint(self.folder, self.variant)
        if self.download:
            fill_cache([checkpoint], quiet=self.quiet)
        plan = plan_dequantization(checkpoint, self.settings)
        target = self.target([plan.architecture.dtype])
        if self.done(target, as_json=as_json):
            return
        measure = None
        if original is not None:
            measure = AgainstOriginal(original_checkpoint(original, checkpoint, self.subfolder))
            measure.check(plan)
        origin = self.origin(checkpoint.library, plan.architecture.class_name)
        carried = companion_files(checkpoint, self.root, self.settings)
        if self.dry_run:
            loss = measure.alone(plan, self.settings) if measure else None
            place, device = str(target.output), self.settings.device
            summary = summarize(plan, origin, place, device=device, carried=carried, loss=loss)
        else:
            with Display("Dequantizing", quiet=self.quiet) as progress:
                summary = carry_out(plan, origin, target, self.settings, progress, carried, measure)
        present(summary, as_json=as_json, quiet=self.quiet, pushed=self.pushed(target))

    def pipeline(self, *, as_json: bool) -> None:
        """All quantized components of a diffusers pipeline."""
        from qz.formats.checkpoint.pipeline import open_pipeline
        from qz.quantize.pipeline import carry_out_pipeline, plan_way_back, summarize_pipeline

        pipeline = open_pipeline(self.folder, self.variant)
        try:
            if self.download:
                fill_cache([each.checkpoint for each in pipeline.components if each.checkpoint], quiet=self.quiet)
            plan = plan_way_back(pipeline, self.settings)
            target = self.target(each.architecture.dtype for each in plan.plans.values())
            if self.done(target, as_json=as_json):
                return
            origin = self.origin("diffusers", pipeline.class_name)
            if self.dry_run:
                place, device = str(target.output), self.settings.device
                summary = summarize_pipeline(plan, origin, place, device=device)
            else:
                with Display("Dequantizing", quiet=self.quiet) as progress:
                    summary = carry_out_pipeline(plan, origin, target, self.settings, progress)
        finally:
            pipeline.close()
        present_pipeline(summary, as_json=as_json, quiet=self.quiet, pushed=self.pushed(target))
