"""``qz dequantize``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

from qz.cli.options import arguments, hub, machine, outputs, reports, selection
from qz.cli.progress import Display, timed
from qz.cli.reports.conversion import present, require_place


def dequantize(
    source: arguments.SourceArg,
    subfolder: selection.SubfolderOpt = None,
    revision: selection.RevisionOpt = None,
    variant: selection.VariantOpt = None,
    allow_pickle: selection.AllowPickleOpt = False,
    file: selection.FileOpt = None,
    config: selection.ConfigOpt = None,
    lora: selection.LoraOpt = None,
    output: outputs.OutputOpt = None,
    dtype: outputs.TargetDTypeOpt = "auto",
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
    against: reports.AgainstOpt = None,
    page: reports.PageOpt = None,
    dry_run: reports.DryRunOpt = False,
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Turn a quantized model back into an ordinary one, streamed, and tell what was lost."""
    from qz import api
    from qz.quantize.compute.allocator import return_freed_memory

    if push_only:  # uploading and computing would fragment the heap by tens of megabytes
        return_freed_memory()
    require_place(page, output)
    with Display(quiet=quiet) as display:
        summary = api.dequantize(
            source,
            output,
            file=file,
            config=config,
            lora=lora or (),
            dtype=dtype,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle,
            against=against,
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
            dry_run=dry_run,
            on_progress=display,
        )
    present(timed(summary), as_json=as_json, quiet=quiet, page=page, push=push)
