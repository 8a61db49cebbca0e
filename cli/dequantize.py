"""``qz dequantize``: options in, one call of ``qz.api``, its report as a table or JSON out."""

from __future__ import annotations

from qz.cli import options
from qz.cli.progress import Display, timed
from qz.cli.report import present
from qz.quantize.settings import DEFAULT_SHARD_BYTES


def dequantize(
    source: options.SourceArg,
    subfolder: options.SubfolderOpt = None,
    revision: options.RevisionOpt = None,
    variant: options.VariantOpt = None,
    allow_pickle: options.AllowPickleOpt = False,
    lora: options.LoraOpt = None,
    output: options.OutputOpt = None,
    dtype: options.TargetDTypeOpt = "auto",
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
    against: options.AgainstOpt = None,
    dry_run: options.DryRunOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Turn a model that bitsandbytes quantized back into an ordinary one, streamed, and tell what was lost."""
    from qz import api

    with Display(quiet=quiet) as display:
        summary = api.dequantize(
            source,
            output,
            lora=lora or (),
            dtype=dtype,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            allow_pickle=allow_pickle,
            against=against,
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
            dry_run=dry_run,
            on_progress=display,
        )
    present(timed(summary), as_json=as_json, quiet=quiet)
