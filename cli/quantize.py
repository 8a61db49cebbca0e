"""``qz quantize``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.progress import Display, timed
from qz.cli.report import present
from qz.quantize.settings import DEFAULT_SHARD_BYTES

if TYPE_CHECKING:
    from qz.quantize.methods import Method


def quantize(
    source: options.SourceArg,
    nf4: options.Nf4Opt = False,
    fp4: options.Fp4Opt = False,
    int8: options.Int8Opt = False,
    method: options.MethodOpt = None,
    double_quant: options.DoubleQuantOpt = False,
    compute_dtype: options.ComputeDTypeOpt = "bfloat16",
    threshold: options.ThresholdOpt = 6.0,
    scales: options.ScalesOpt = None,
    importance: options.ImportanceOpt = None,
    rounding: options.RoundingOpt = "nearest",
    target_size: options.TargetSizeOpt = None,
    max_loss: options.MaxLossOpt = None,
    scores: options.ScoresFileOpt = None,
    split_groups: options.SplitGroupsOpt = False,
    subfolder: options.SubfolderOpt = None,
    revision: options.RevisionOpt = None,
    variant: options.VariantOpt = None,
    allow_pickle: options.AllowPickleOpt = False,
    skip: options.SkipOpt = None,
    no_default_skips: options.NoDefaultSkipsOpt = False,
    experts: options.ExpertsOpt = False,
    components: options.ComponentsOpt = None,
    component: options.ComponentOpt = None,
    keep_nonfinite: options.KeepNonfiniteOpt = False,
    file: options.FileOpt = None,
    config: options.ConfigOpt = None,
    lora: options.LoraOpt = None,
    layout: options.LayoutOpt = "diffusers",
    output: options.OutputOpt = None,
    dtype: options.DTypeOpt = "auto",
    max_shard_size: options.MaxShardSizeOpt = DEFAULT_SHARD_BYTES,
    weights_only: options.WeightsOnlyOpt = False,
    if_exists: options.IfExistsOpt = "error",
    overwrite: options.OverwriteOpt = False,
    resume: options.ResumeOpt = True,
    part: options.PartOpt = None,
    fsync: options.FsyncOpt = True,
    device: options.DeviceOpt = "auto",
    threads: options.ThreadsOpt = None,
    download: options.DownloadOpt = False,
    push: options.PushOpt = None,
    push_subfolder: options.IntoSubfolderOpt = None,
    push_only: options.PushOnlyOpt = False,
    public: options.PublicOpt = None,
    report: options.ReportOpt = False,
    dry_run: options.DryRunOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Quantize a model to 4 or 8 bit, streamed: no GPU needed, using a few megabytes of memory per thread."""
    from qz import api

    name = options.method_name(nf4, fp4, int8, method)
    own = options.parse_component_methods(component)
    four_bit_too = name == "int8" and any(each in ("nf4", "fp4") for each in own.values())
    with Display(quiet=quiet) as display:
        summary = api.quantize(
            source,
            output,
            method=chosen_method(name, double_quant and not four_bit_too, compute_dtype, threshold),
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
            components=options.parse_components(components),
            component_methods={
                part: None
                if each == "none"
                else chosen_method(each, double_quant and each != "int8", compute_dtype, threshold)
                for part, each in own.items()
            },
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
            if_exists=options.existing_output(overwrite, if_exists),
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
    present(timed(summary), as_json=as_json, quiet=quiet)


def chosen_method(name: str, double_quant: bool, compute_dtype: str, threshold: float) -> Method:
    """The method with its settings; UsageError for a setting that the method does not have."""
    from qz import UsageError
    from qz.quantize.methods import FourBit, Int8

    if name == "int8":
        if double_quant:
            raise UsageError("--double-quant belongs to the 4-bit methods; int8 has no block statistics to quantize.")
        return Int8(threshold)
    return FourBit("fp4" if name == "fp4" else "nf4", double_quant, compute_dtype)
