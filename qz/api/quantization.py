"""``quantize``: options in, the report of the run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qz import UsageError
from qz.api.conversions import once_more_if_lost, possible_destination, publication_for, published, share_of
from qz.api.paths import AnyPath
from qz.formats.borrowed import settings_given_back
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.methods import Method, Nf4
from qz.quantize.settings import DEFAULT_SHARD_BYTES, IfExists, Layout, Rounding, Scales, Settings

if TYPE_CHECKING:
    from qz.api.conversions import Converted


@settings_given_back()
@once_more_if_lost
def quantize(
    source: AnyPath,
    output: AnyPath | None = None,
    *,
    method: Method | None = None,
    file: str | None = None,
    config: AnyPath | None = None,
    layout: Layout = "diffusers",
    lora: Sequence[str] = (),
    dtype: str = "auto",
    skip: Sequence[str] = (),
    default_skips: bool = True,
    experts: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    components: Sequence[str] | None = None,
    component_methods: Mapping[str, Method | None] | None = None,
    scales: Scales | None = None,
    importance: AnyPath | None = None,
    rounding: Rounding = "nearest",
    target_size: int | None = None,
    max_loss: float | None = None,
    scores: AnyPath | None = None,
    split_groups: bool = False,
    keep_nonfinite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    weights_only: bool = False,
    if_exists: IfExists = "error",
    resume: bool = True,
    fsync: bool = True,
    device: str = "auto",
    threads: int | None = None,
    download: bool = False,
    push: str | None = None,
    push_subfolder: str | None = None,
    push_only: bool = False,
    public: bool | None = None,
    part: str | None = None,
    measure_loss: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> Converted:
    """Quantize a model, or a diffusers pipeline component by component, to 4 or 8 bit.

    ``source`` is a folder or a repository on the Hub, ``output`` a folder that is made; without it one named after the
    source. ``method`` is ``Nf4()`` (the default), ``Fp4()`` or ``Int8()``, each with its settings. ``skip`` names
    linears to keep, ``experts`` quantizes those of MoE models, too (load the output with ``qz.load``),
    ``component_methods`` components with a method of their own (None: unchanged). ``scales="search"`` makes 4-bit
    weights of the same format with less error, and with less still where ``importance`` names a file of it.
    ``source`` may be one .safetensors file in a model's original names, or have such a ``file``; ``config`` names the
    folder or repository of its config, and ``layout="single-file"`` writes one file in those names. ``lora`` names
    LoRAs to fuse into the weights first, each as REPO|FOLDER|FILE[:SCALE]; then the model may be one that bitsandbytes
    quantized, whose dequantized weights they are fused into.
    ``target_size`` (bytes in memory) and ``max_loss`` keep the most sensitive linears unquantized, those that the file
    ``scores`` of ``calibrate`` names; of a pipeline ``target_size`` chooses each component's method as well.
    ``measure_loss`` adds the loss of every layer to the summary. ``push`` publishes the output in that repository; with
    ``push_only``, shard by shard, so that no output is kept here. ``part`` ``"3/7"`` makes one of seven parts, which
    ``merge`` puts together; ``"auto"`` the one that the environment of an array job names. The other arguments are the
    options of ``qz quantize``, see the command reference.

    Raises ``qz.QzError``: UsageError, MissingInput, MalformedInput, Unsupported, OutputRefused, HubUnreachable,
    PermissionRefused, TryAgain or IOFailed. Whatever is raised, the output is absent or complete.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.pipeline import is_pipeline, pipeline_class
    from qz.formats.output.storage.disk import Disk
    from qz.formats.source import default_output, opened, opened_loras
    from qz.quantize.conversion import Conversion

    method = method or Nf4()
    settings = Settings(
        method,
        dtype,
        tuple(skip),
        default_skips=default_skips,
        experts=experts,
        max_shard_bytes=max_shard_bytes,
        device=device,
        threads=threads or 0,
        keep_nonfinite=keep_nonfinite,
        weights_only=weights_only,
        components=tuple(components) if components is not None else None,
        component_methods=dict(component_methods or {}),
        scales=scales or ("absmax" if importance is None else "search"),
        importance=Path(importance) if importance is not None else None,
        rounding=rounding,
        target_size=target_size,
        max_loss=max_loss,
        scores=Path(scores) if scores is not None else None,
        split_groups=split_groups,
        variant=variant,
        layout=layout,
        file=file,
        config=str(config) if config is not None else None,
        allow_pickle=allow_pickle,
    )
    location = str(source)
    share = share_of(part, measured=measure_loss, pushed=push is not None and not push_only)
    with (
        opened_loras(lora) as loras,
        opened(location, subfolder, revision, cached=push is None, allow_pickle=allow_pickle, file=file) as found,
    ):
        settings = replace(settings, loras=loras)
        if config is not None and found.file is None:
            raise UsageError("--config says what a single file is a model of. Name such a file, or leave it out.")
        to = possible_destination(push, push_subfolder, public, found, loras)
        publication = publication_for(to, found, if_exists, on_progress, loras) if push_only else None
        conversion = Conversion(
            source=found,
            settings=settings,
            output=Path(output) if output is not None else default_output(location, subfolder, method.name),
            if_exists=if_exists,
            resume=resume,
            disk=Disk(durable=fsync),
            download=download,
            dry_run=dry_run,
            on_progress=on_progress,
            publication=publication,
            share=share,
        )
        if layout == "single-file" and found.file is None:
            raise UsageError(
                "--layout single-file writes the names of the file that is read: name one original .safetensors file."
            )
        if is_pipeline(found.folder):
            if experts:
                raise UsageError(
                    f"--experts is for one model, and {found.folder.location} is a pipeline. Name a component with "
                    "--subfolder."
                )
            if measure_loss:
                raise UsageError(
                    f"--report measures one model, and {found.folder.location} is a pipeline. Name a component with "
                    "--subfolder, or leave it out."
                )
            from qz.quantize.pipeline import plan_pipeline

            return published(conversion.pipeline(plan_pipeline), conversion, to)
        if components is not None or component_methods:
            raise UsageError(
                f"{found.folder.location} is one model, not a pipeline: leave out --components and --component."
            )
        from qz.quantize.convert import plan_quantization
        from qz.quantize.streaming.measure import WhileQuantizing

        measure = (lambda _: WhileQuantizing()) if measure_loss else None
        component, of = (subfolder or "").strip("/"), pipeline_class(found.root) if loras else None
        plan = partial(plan_quantization, component=component, pipeline_class=of)
        return published(conversion.model(plan, measure), conversion, to)
