"""``qz quantize``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

from qz.cli.options import arguments, hub, machine, methods, outputs, reports, selection
from qz.cli.progress import Display, timed
from qz.cli.reports.conversion import present, require_place


def quantize(
    source: arguments.SourceArg,
    nf4: methods.Nf4Opt = False,
    fp4: methods.Fp4Opt = False,
    int8: methods.Int8Opt = False,
    method: methods.MethodOpt = None,
    double_quant: methods.DoubleQuantOpt = False,
    compute_dtype: methods.ComputeDTypeOpt = None,
    threshold: methods.ThresholdOpt = None,
    scales: methods.ScalesOpt = None,
    importance: methods.ImportanceOpt = None,
    rounding: methods.RoundingOpt = "nearest",
    target_size: methods.TargetSizeOpt = None,
    max_loss: methods.MaxLossOpt = None,
    scores: methods.ScoresFileOpt = None,
    split_groups: methods.SplitGroupsOpt = False,
    subfolder: selection.SubfolderOpt = None,
    revision: selection.RevisionOpt = None,
    variant: selection.VariantOpt = None,
    allow_pickle: selection.AllowPickleOpt = False,
    skip: selection.SkipOpt = None,
    no_default_skips: selection.NoDefaultSkipsOpt = False,
    experts: selection.ExpertsOpt = False,
    components: selection.ComponentsOpt = None,
    component: selection.ComponentOpt = None,
    keep_nonfinite: selection.KeepNonfiniteOpt = False,
    file: selection.FileOpt = None,
    config: selection.ConfigOpt = None,
    lora: selection.LoraOpt = None,
    layout: outputs.LayoutOpt = "diffusers",
    output: outputs.OutputOpt = None,
    dtype: outputs.DTypeOpt = "auto",
    max_shard_size: outputs.MaxShardSizeOpt = None,
    weights_only: outputs.WeightsOnlyOpt = False,
    if_exists: outputs.IfExistsOpt = "error",
    overwrite: outputs.OverwriteOpt = False,
    resume: outputs.ResumeOpt = True,
    part: outputs.PartOpt = None,
    fsync: outputs.FsyncOpt = True,
    device: machine.DeviceOpt = "auto",
    threads: machine.ThreadsOpt = None,
    download: machine.DownloadOpt = False,
    push: hub.PushOpt = None,
    push_subfolder: hub.IntoSubfolderOpt = None,
    push_only: hub.PushOnlyOpt = False,
    public: hub.PublicOpt = None,
    report: reports.ReportOpt = False,
    page: reports.PageOpt = None,
    dry_run: reports.DryRunOpt = False,
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Quantize a model to 4 or 8 bit, streamed: no GPU needed, using a few megabytes of memory per thread."""
    from qz import api
    from qz.quantize.compute.allocator import return_freed_memory

    if push_only:  # uploading and computing would fragment the heap by tens of megabytes
        return_freed_memory()
    name = methods.method_name(nf4, fp4, int8, method)
    own = selection.parse_component_methods(component)
    how = methods.MethodOptions(double_quant, compute_dtype, threshold)
    how.require_method([name or "nf4", *own.values()])
    asked = name is not None or how != methods.MethodOptions()
    require_place(page, output)
    with Display(quiet=quiet) as display:
        summary = api.quantize(
            source,
            output,
            method=how.method(name or "nf4") if asked else None,
            file=file,
            config=config,
            layout=layout,
            lora=lora or (),
            dtype=dtype,
            skip=skip or (),
            default_skips=not no_default_skips,
            experts=experts,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle,
            components=selection.parse_components(components),
            component_methods={where: None if each == "none" else how.method(each) for where, each in own.items()},
            scales=scales,
            importance=importance,
            rounding=rounding,
            target_size=target_size,
            max_loss=max_loss,
            scores=scores,
            split_groups=split_groups,
            keep_nonfinite=keep_nonfinite,
            max_shard_bytes=max_shard_size,
            weights_only=weights_only,
            if_exists=outputs.existing_output(overwrite, if_exists),
            resume=resume,
            fsync=fsync,
            device=device,
            threads=threads,
            download=download,
            push=push,
            push_subfolder=push_subfolder,
            push_only=push_only,
            public=public,
            part=part,
            measure_loss=report,
            dry_run=dry_run,
            on_progress=display,
        )
    present(timed(summary), as_json=as_json, quiet=quiet, page=page, push=push)
