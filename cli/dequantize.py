"""``qz dequantize``: from options to a plan, and from its summary to a table or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qz.cli import options
from qz.cli.progress import Display
from qz.cli.report import present

if TYPE_CHECKING:
    from qz.formats.folder import Folder


def dequantize(
    source: options.SourceArg,
    subfolder: options.SubfolderOpt = None,
    revision: options.RevisionOpt = None,
    variant: options.VariantOpt = None,
    output: options.OutputOpt = None,
    dtype: options.TargetDTypeOpt = "auto",
    max_shard_size: options.MaxShardSizeOpt = options.DEFAULT_SHARD_SIZE,
    weights_only: options.WeightsOnlyOpt = False,
    overwrite: options.OverwriteOpt = False,
    resume: options.ResumeOpt = True,
    device: options.DeviceOpt = "auto",
    threads: options.ThreadsOpt = None,
    against: options.AgainstOpt = None,
    dry_run: options.DryRunOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Turn a model that bitsandbytes quantized back into an ordinary one, streamed, and tell what was lost."""
    from qz.formats.checkpoint import open_checkpoint
    from qz.formats.source import enter, open_source, output_name
    from qz.quantize.convert import Settings, Target, carry_out, goes_along
    from qz.quantize.dequantize import plan_dequantization
    from qz.quantize.measure import AgainstOriginal, original_checkpoint
    from qz.quantize.summary import Source, summarize

    settings = Settings(
        None,
        dtype,
        max_shard_bytes=max_shard_size,
        device=device,
        threads=threads or 0,
        weights_only=weights_only,
    )
    root = open_source(source, None, revision)
    folders: list[Folder] = [root]
    try:
        folder = enter(root, subfolder)
        folders.append(folder)
        checkpoint = open_checkpoint(folder, variant)
        plan = plan_dequantization(checkpoint, settings)
        measure = None
        if against is not None:
            original = open_source(against)
            folders.append(original)
            measure = AgainstOriginal(original_checkpoint(original, checkpoint, subfolder))
            measure.check(plan)
        commit = folder.identity().get("commit")
        origin = Source(source, commit, subfolder, checkpoint.library, plan.architecture.class_name)
        target = Target(output or Path(output_name(source, subfolder, plan.architecture.dtype)), overwrite, resume)
        carried = goes_along(checkpoint, root, settings)
        if dry_run:
            loss = measure.alone(plan, settings) if measure else None
            summary = summarize(plan, origin, str(target.output), device=device, carried=carried, loss=loss)
        else:
            with Display("Dequantizing", quiet=quiet) as progress:
                summary = carry_out(plan, origin, target, settings, progress, carried, measure)
    finally:
        for opened in folders:
            opened.close()
    present(summary, as_json=as_json, quiet=quiet)
