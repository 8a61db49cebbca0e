"""``qz quantize``: from options to a plan, and from its summary to a table or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.pipeline_report import present_pipeline
from qz.cli.progress import Display
from qz.cli.report import present, present_existing
from qz.cli.transfer import fill_cache, publishing

if TYPE_CHECKING:
    from qz.formats.folder import Folder
    from qz.quantize.methods import Method
    from qz.quantize.pipeline_summary import PipelineSummary
    from qz.quantize.settings import Settings
    from qz.quantize.streaming.output_parts import Target
    from qz.quantize.summary import Source, Summary


def quantize(
    source: options.SourceArg,
    nf4: options.Nf4Opt = False,
    fp4: options.Fp4Opt = False,
    int8: options.Int8Opt = False,
    double_quant: options.DoubleQuantOpt = False,
    compute_dtype: options.ComputeDTypeOpt = "bfloat16",
    threshold: options.ThresholdOpt = 6.0,
    subfolder: options.SubfolderOpt = None,
    revision: options.RevisionOpt = None,
    variant: options.VariantOpt = None,
    skip: options.SkipOpt = None,
    no_default_skips: options.NoDefaultSkipsOpt = False,
    components: options.ComponentsOpt = None,
    component: options.ComponentOpt = None,
    keep_nonfinite: options.KeepNonfiniteOpt = False,
    output: options.OutputOpt = None,
    dtype: options.DTypeOpt = "auto",
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
    report: options.ReportOpt = False,
    dry_run: options.DryRunOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Quantize a model to 4 or 8 bit, streamed: no GPU needed, memory for a few megabytes a thread."""
    name = options.method_name(nf4, fp4, int8)
    own = options.parse_component_methods(component)
    four_bit_too = name == "int8" and any(each in ("nf4", "fp4") for each in own.values())
    method = chosen_method(name, double_quant and not four_bit_too, compute_dtype, threshold)

    from qz.formats.checkpoint.pipeline import is_pipeline
    from qz.formats.output.disk import Disk
    from qz.formats.output.staging import check_output
    from qz.formats.source import enter, open_source, output_name
    from qz.quantize.compute.devices import prewarm_cuda
    from qz.quantize.settings import Settings
    from qz.quantize.streaming.output_parts import Target
    from qz.quantize.up_to_date import up_to_date

    settings = Settings(
        method,
        dtype,
        tuple(skip or ()),
        default_skips=not no_default_skips,
        max_shard_bytes=max_shard_size,
        device=device,
        threads=threads or 0,
        keep_nonfinite=keep_nonfinite,
        weights_only=weights_only,
        components=options.parse_components(components),
        component_methods={
            part: None
            if each == "none"
            else chosen_method(each, double_quant and each != "int8", compute_dtype, threshold)
            for part, each in own.items()
        },
    )
    existing = options.existing_output(overwrite, if_exists)
    place = output or Path(output_name(source, subfolder, name))
    target = Target(place, existing == "overwrite", resume, Disk(durable=fsync))
    root = open_source(source, None, revision)
    folder = root
    try:
        folder = enter(root, subfolder)
        publish = publishing(push, public, folder, dry_run=dry_run, quiet=quiet)
        record = up_to_date(target.output, folder, settings) if existing == "skip" and not dry_run else None
        if record is not None:
            pushed = publish(target.output) if publish else None
            present_existing(record, target.output, source, as_json=as_json, pushed=pushed)
            return
        if not dry_run:
            check_output(target.output, target.overwrite, [root], target.disk)
            prewarm_cuda(device)
        fetch = download and not dry_run
        run = Conversion(source, subfolder, root, folder, target, settings, variant, fetch, report, dry_run, quiet)
        if is_pipeline(folder):
            whole = run.pipeline()
            pushed = publish(target.output) if publish else None
            present_pipeline(whole, as_json=as_json, quiet=quiet, pushed=pushed)
        else:
            model = run.model()
            pushed = publish(target.output) if publish else None
            present(model, as_json=as_json, quiet=quiet, pushed=pushed)
    finally:
        folder.close()
        root.close()


@dataclass(frozen=True)
class Conversion:
    """A source and what to make of it."""

    source: str
    subfolder: str | None
    root: Folder
    folder: Folder
    target: Target
    settings: Settings
    variant: str | None
    download: bool
    report: bool
    dry_run: bool
    quiet: bool

    def origin(self, library: str, architecture: str) -> Source:
        from qz.quantize.summary import Source

        return Source(self.source, self.folder.identity().get("commit"), self.subfolder, library, architecture)

    def model(self) -> Summary:
        """One model. Raises UsageError for options that are for pipelines."""
        from qz import UsageError
        from qz.formats.checkpoint.survey import open_checkpoint
        from qz.quantize.convert import carry_out, companion_files, plan_quantization
        from qz.quantize.streaming.measure import WhileQuantizing
        from qz.quantize.summary import summarize

        settings, target = self.settings, self.target
        if settings.components is not None or settings.component_methods:
            raise UsageError(
                f"{self.folder.location} is one model, not a pipeline: leave out --components and --component."
            )
        checkpoint = open_checkpoint(self.folder, self.variant)
        if self.download:
            fill_cache([checkpoint], quiet=self.quiet)
        plan = plan_quantization(checkpoint, settings)
        origin = self.origin(checkpoint.library, plan.architecture.class_name)
        carried = companion_files(checkpoint, self.root, settings)
        measure = WhileQuantizing() if self.report else None
        if self.dry_run:
            loss = measure.alone(plan, settings) if measure else None
            return summarize(plan, origin, str(target.output), device=settings.device, carried=carried, loss=loss)
        with Display("Quantizing", quiet=self.quiet) as progress:
            return carry_out(plan, origin, target, settings, progress, carried, measure)

    def pipeline(self) -> PipelineSummary:
        """All components of a diffusers pipeline."""
        from qz import UsageError
        from qz.formats.checkpoint.pipeline import open_pipeline
        from qz.quantize.pipeline import carry_out_pipeline, plan_pipeline, summarize_pipeline

        settings, target = self.settings, self.target
        if self.report:
            raise UsageError(
                f"--report measures one model, and {self.folder.location} is a pipeline. Name a component with "
                "--subfolder, or leave it out."
            )
        pipeline = open_pipeline(self.folder, self.variant)
        try:
            if self.download:
                fill_cache([each.checkpoint for each in pipeline.components if each.checkpoint], quiet=self.quiet)
            plan = plan_pipeline(pipeline, settings)
            origin = self.origin("diffusers", pipeline.class_name)
            if self.dry_run:
                return summarize_pipeline(plan, origin, str(target.output), device=settings.device)
            with Display("Quantizing", quiet=self.quiet) as progress:
                return carry_out_pipeline(plan, origin, target, settings, progress)
        finally:
            pipeline.close()


def chosen_method(name: str, double_quant: bool, compute_dtype: str, threshold: float) -> Method:
    """The method with its settings; UsageError for a setting that the method does not have."""
    from qz import UsageError
    from qz.quantize.methods import FourBit, Int8

    if name == "int8":
        if double_quant:
            raise UsageError("--double-quant belongs to the 4-bit methods; int8 has no block statistics to quantize.")
        return Int8(threshold)
    return FourBit("fp4" if name == "fp4" else "nf4", double_quant, compute_dtype)
