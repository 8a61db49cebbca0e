"""``qz quantize``: from options to a plan, and from its summary to a table or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.output import Column, facts, markdown_table, percent, quantity, say, show, size, table, warn, write_step_summary
from qz.cli.progress import Display

if TYPE_CHECKING:
    from qz.quantize.methods import Method
    from qz.quantize.summary import Summary


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
    keep_nonfinite: options.KeepNonfiniteOpt = False,
    output: options.OutputOpt = None,
    dtype: options.DTypeOpt = "auto",
    max_shard_size: options.MaxShardSizeOpt = options.DEFAULT_SHARD_SIZE,
    overwrite: options.OverwriteOpt = False,
    resume: options.ResumeOpt = True,
    device: options.DeviceOpt = "auto",
    threads: options.ThreadsOpt = None,
    dry_run: options.DryRunOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Quantize a model to 4 or 8 bit, streamed: no GPU needed, memory for a few megabytes a thread."""
    name = options.method_name(nf4, fp4, int8)
    method = chosen_method(name, double_quant, compute_dtype, threshold)

    from qz.formats.checkpoint import open_checkpoint
    from qz.formats.source import open_source, output_name
    from qz.quantize.convert import Settings, Target, carry_out, plan_quantization
    from qz.quantize.summary import Source, summarize

    settings = Settings(
        method,
        dtype,
        tuple(skip or ()),
        default_skips=not no_default_skips,
        max_shard_bytes=max_shard_size,
        device=device,
        threads=threads or 0,
        keep_nonfinite=keep_nonfinite,
    )
    target = Target(output or Path(output_name(source, subfolder, name)), overwrite, resume)
    folder = open_source(source, subfolder, revision)
    try:
        plan = plan_quantization(open_checkpoint(folder, variant), settings)
        commit = folder.identity().get("commit")
        origin = Source(source, commit, subfolder, plan.checkpoint.library, plan.architecture.class_name)
        if dry_run:
            summary = summarize(plan, origin, str(target.output), device=device)
        else:
            with Display("Quantizing", quiet=quiet) as progress:
                summary = carry_out(plan, origin, target, settings, progress)
    finally:
        folder.close()
    present(summary, as_json=as_json, quiet=quiet)


def chosen_method(name: options.MethodName, double_quant: bool, compute_dtype: str, threshold: float) -> Method:
    """The method with its settings; UsageError for a setting that the method does not have."""
    from qz import UsageError
    from qz.quantize.methods import FourBit, Int8

    if name == "int8":
        if double_quant:
            raise UsageError("--double-quant belongs to the 4-bit methods; int8 has no block statistics to quantize.")
        return Int8(threshold)
    return FourBit(name, double_quant, compute_dtype)


def present(summary: Summary, *, as_json: bool, quiet: bool = False) -> None:
    """The report of a conversion: a table or JSON on stdout, warnings on stderr, Markdown for a CI job's page."""
    for warning in summary.warnings:
        warn(warning)
    rows = report(summary)
    show(summary.as_json(), as_json=as_json, text=facts(rows))
    if not quiet and not as_json and summary.dry_run:
        columns = (Column("file", foldable=True), Column("bytes", right=True))
        say(table(columns, [(shard.name, f"{shard.bytes:,}") for shard in summary.shards]))
    if not summary.dry_run:
        write_step_summary(f"### qz: {summary.method}\n\n" + markdown_table((Column(""), Column("")), rows))


def report(summary: Summary) -> list[tuple[str, str]]:
    """The summary as labels and values."""
    source = summary.source
    method = summary.method + (" + double quant" if summary.double_quant else "")
    saved = f"{size(summary.bytes_source)} → {size(summary.bytes_output)}"
    rows = [
        ("source", source.location + (f" ({source.subfolder})" if source.subfolder else "")),
        ("model", f"{source.architecture} ({source.library})"),
        ("output", summary.output + (" (dry run: nothing written)" if summary.dry_run else "")),
        ("method", f"{method}, {summary.dtype} elsewhere" if summary.method != "none" else summary.dtype),
        (
            "parameters",
            f"{quantity(summary.parameters)}, "
            f"{percent(summary.quantized_parameters, summary.parameters)} of them quantized",
        ),
        ("on disk", f"{saved} ({summary.bits_per_weight:.2f} bits per weight)"),
        ("in memory", f"{size(summary.footprint_before)} → {size(summary.footprint_after)}"),
    ]
    if summary.skipped:
        names = list(summary.skipped)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        rows.append(("left alone", f"{shown} ({', '.join(sorted(set(summary.skipped.values())))})"))
    if not summary.dry_run:
        rate = summary.bytes_source / summary.seconds if summary.seconds else 0
        rows.append(("took", f"{summary.seconds:.1f} s on {summary.device} ({size(rate)}/s)"))
    return rows
