"""``quantize``: options in, the report of the run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qz.api.conversions import ConversionRequest, once_more_if_lost, published
from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.global_settings import settings_restored
from qz.formats.tensors.shards import DEFAULT_SHARD_BYTES
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.methods import FourBit, Method, Nf4
from qz.quantize.settings import IfExists, Layout, Rounding, Scales, Settings

if TYPE_CHECKING:
    from qz.api.conversions import Converted
    from qz.formats.checkpoint.pipeline import Pipeline
    from qz.quantize.conversion import Conversion
    from qz.quantize.pipelines.plan import PipelinePlan


@settings_restored()
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
    max_shard_bytes: int | None = None,
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
    ``scores`` of ``calibrate`` names; of a pipeline ``target_size`` chooses each component's method as well,
    and both choose among the linears of all its components.
    ``measure_loss`` adds the loss of every layer to the summary. ``push`` publishes the output in that repository; with
    ``push_only``, shard by shard, so that no output is kept here. ``part`` ``"3/7"`` makes one of seven parts, which
    ``merge`` puts together; ``"auto"`` the one that the environment of an array job names. The other arguments are the
    options of ``qz quantize``, see the command reference.

    Raises ``qz.QzError``: UsageError, MissingInput, MalformedInput, Unsupported, OutputRefused, HubUnreachable,
    PermissionRefused, TryAgain or IOFailed. Whatever is raised, the output is absent or complete.
    """
    asked = Asked.of(quantize, locals() | ({"scales": None} if scales == "absmax" else {}))
    on_progress(Progress("Reading headers"))
    from qz.quantize.libraries.importing.gpu_driver import ask_meanwhile

    if device == "auto" and not dry_run:
        ask_meanwhile()
    from qz.formats.output.storage.beside import reachable
    from qz.formats.source import default_output

    chosen = method or Nf4()
    settings = Settings(
        chosen,
        dtype,
        tuple(skip),
        default_skips=default_skips,
        experts=experts,
        max_shard_bytes=DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes,
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
    for named in filter(None, (settings.importance, settings.scores)):
        from qz.quantize.importance.named_file import require_file_of_statistics

        require_file_of_statistics(named)
    location = str(source)
    request = ConversionRequest(
        source=location,
        subfolder=subfolder,
        revision=revision,
        lora=lora,
        output=reachable(Path(output)) if output is not None else default_output(location, subfolder, chosen.name),
        if_exists=if_exists,
        resume=resume,
        fsync=fsync,
        download=download,
        push=push,
        push_subfolder=push_subfolder,
        push_only=push_only,
        public=public,
        part=part,
        measured=measure_loss,
        dry_run=dry_run,
        on_progress=on_progress,
    )
    with request.opened(asked, settings) as (conversion, publishing):
        return published(_quantized(conversion, asked, method), conversion, publishing)


def _quantized(conversion: Conversion, asked: Asked, method: Method | None) -> Converted:
    """The report of the conversion; ``method``: the one that was named, if one was."""
    from qz.formats.files.folder import is_pipeline

    plan_asked = partial(_plan_pipeline, asked=asked, method=method, measure_loss=conversion.measured)
    if is_pipeline(conversion.source.folder):
        return conversion.pipeline(plan_asked)
    from qz.quantize.models.plan import plan_quantization
    from qz.quantize.streaming.measuring.measure import WhileQuantizing

    measure = (lambda _: WhileQuantizing()) if conversion.measured else None
    if conversion.source.file is None:
        return conversion.model(plan_quantization, measure)
    return conversion.file(
        plan_quantization,
        plan_asked,
        measure,
        require=lambda several: asked.require(pipeline=several, one_inside=not several),
    )


def _plan_pipeline(
    pipeline: Pipeline, settings: Settings, *, asked: Asked, method: Method | None, measure_loss: bool
) -> PipelinePlan:
    """``plan_pipeline``; refuses or notes what no component takes. ``method``: the one that was named, if one was."""
    from qz.quantize.pipelines.plan import plan_pipeline
    from qz.quantize.streaming.measuring.measure import WhileQuantizing

    plan = plan_pipeline(pipeline, settings)
    if measure_loss:
        plan = replace(plan, measures={name: WhileQuantizing() for name in plan.plans})
    methods = {choice.method for choice in plan.choices}
    asked.require(four_bit=any(isinstance(each, FourBit) for each in methods))
    if method is None or method in methods or settings.target_size is not None:  # a size chooses methods
        return plan
    unused = f"no component took {method.name}: each has a method of its own, or stays as it is"
    return replace(plan, notes=(*plan.notes, unused))
