"""qz from Python: each command as a function that returns the value which ``--json`` prints.

::

    from qz.api import Nf4, quantize

    summary = quantize("black-forest-labs/FLUX.1-dev", "flux-nf4", subfolder="transformer", method=Nf4())
    print(summary.footprint_after)

What goes wrong is raised as a ``qz.QzError``, whose message says what, where, why and what next. Returned values are
dataclasses; ``as_json()`` gives the documented object. ``on_progress`` is called from any thread, see ``Progress``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial, wraps
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from qz import UsageError
from qz.formats.borrowed import settings_given_back
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.methods import Fp4, Int8, Method, Nf4
from qz.quantize.settings import DEFAULT_SHARD_BYTES, IfExists, Layout, Rounding, Scales, Settings

if TYPE_CHECKING:
    from qz.formats.checkpoint.adapter_file import AdapterFile
    from qz.formats.folder import Folder
    from qz.formats.output.shares import Share
    from qz.formats.publish.destination import Destination, PushResult
    from qz.formats.publish.publication import Publication
    from qz.formats.source import OpenedSource
    from qz.quantize.calibration.compare import Comparison
    from qz.quantize.calibration.run import Calibration
    from qz.quantize.inspection.pipeline import PipelineInspection
    from qz.quantize.inspection.report import Inspection
    from qz.quantize.merge import Merged
    from qz.quantize.pipeline_summary import PipelineSummary
    from qz.quantize.summary import Summary
    from qz.quantize.up_to_date import UpToDate
    from qz.quantize.verification.report import Verification

    Converted = Summary | PipelineSummary | UpToDate

__all__ = [
    "Fp4",
    "Int8",
    "Nf4",
    "Progress",
    "calibrate",
    "compare",
    "dequantize",
    "inspect",
    "load",
    "merge",
    "push",
    "quantize",
    "verify",
]

AnyPath = str | PathLike[str]
LARGE_INDEX = 1 << 20
"""Bytes: to read the headers of so many tensors takes a while, also from a folder here."""
P = ParamSpec("P")


def once_more_if_lost(convert: Callable[P, Converted]) -> Callable[P, Converted]:
    """Convert again if the Hub has lost meanwhile what was sent to it; what it still has is not made anew."""

    @wraps(convert)
    def converted(*arguments: P.args, **named: P.kwargs) -> Converted:
        from qz.formats.publish.destination import UploadsLost

        try:
            return convert(*arguments, **named)
        except UploadsLost:
            return convert(*arguments, **named)

    return converted


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
    from qz.formats.output.disk import Disk
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
    share = _share(part, measured=measure_loss, pushed=push is not None and not push_only)
    with (
        opened_loras(lora) as loras,
        opened(location, subfolder, revision, cached=push is None, allow_pickle=allow_pickle, file=file) as found,
    ):
        settings = replace(settings, loras=loras)
        if config is not None and found.file is None:
            raise UsageError("--config says what a single file is a model of. Name such a file, or leave it out.")
        to = _destination(push, push_subfolder, public, found, loras)
        publication = _publication(to, found, if_exists, on_progress, loras) if push_only else None
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

            return _published(conversion.pipeline(plan_pipeline), to, found, on_progress, loras)
        if components is not None or component_methods:
            raise UsageError(
                f"{found.folder.location} is one model, not a pipeline: leave out --components and --component."
            )
        from qz.quantize.convert import plan_quantization
        from qz.quantize.streaming.measure import WhileQuantizing

        measure = (lambda _: WhileQuantizing()) if measure_loss else None
        component, of = (subfolder or "").strip("/"), pipeline_class(found.root) if loras else None
        plan = partial(plan_quantization, component=component, pipeline_class=of)
        return _published(conversion.model(plan, measure), to, found, on_progress, loras)


@settings_given_back()
@once_more_if_lost
def dequantize(
    source: AnyPath,
    output: AnyPath | None = None,
    *,
    lora: Sequence[str] = (),
    dtype: str = "auto",
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    against: AnyPath | None = None,
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
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> Converted:
    """Turn a model or pipeline that bitsandbytes quantized back into an ordinary one.

    ``against`` names the original: what quantization lost is measured and becomes part of the summary. ``lora`` names
    LoRAs to fuse into the dequantized weights. The other arguments are those of ``quantize``. Raises ``qz.QzError`` as
    ``quantize`` does.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.pipeline import is_pipeline, pipeline_class
    from qz.formats.output.disk import Disk
    from qz.formats.source import opened, opened_loras
    from qz.quantize.conversion import Conversion

    if lora and against is not None:
        raise UsageError("--against measures what quantization lost, and --lora changes the weights. Use one of them.")
    settings = Settings(
        None,
        dtype,
        max_shard_bytes=max_shard_bytes,
        device=device,
        threads=threads or 0,
        weights_only=weights_only,
        variant=variant,
        allow_pickle=allow_pickle,
    )
    share = _share(part, measured=against is not None, pushed=push is not None and not push_only)
    with opened_loras(lora) as loras, opened(str(source), subfolder, revision, cached=push is None) as found:
        settings = replace(settings, loras=loras)
        to = _destination(push, push_subfolder, public, found, loras)
        publication = _publication(to, found, if_exists, on_progress, loras) if push_only else None
        conversion = Conversion(
            source=found,
            settings=settings,
            output=Path(output) if output is not None else None,
            if_exists=if_exists,
            resume=resume,
            disk=Disk(durable=fsync),
            download=download,
            dry_run=dry_run,
            on_progress=on_progress,
            publication=publication,
            share=share,
        )
        if is_pipeline(found.folder):
            if against is not None:
                raise UsageError("--against compares one model. Name a component with --subfolder, or leave it out.")
            from qz.quantize.pipeline import plan_way_back

            return _published(conversion.pipeline(plan_way_back), to, found, on_progress, loras)
        from qz.quantize.planning.dequantization import plan_dequantization
        from qz.quantize.streaming.measure import AgainstOriginal, original_checkpoint

        with nullcontext() if against is None else opened(str(against)) as original:
            measure = None
            if original is not None:
                measure = lambda it: AgainstOriginal(original_checkpoint(original.folder, it, subfolder))  # noqa: E731
            component, of = (subfolder or "").strip("/"), pipeline_class(found.root) if loras else None
            plan = partial(plan_dequantization, component=component, pipeline_class=of)
            return _published(conversion.model(plan, measure), to, found, on_progress, loras)


@settings_given_back()
def inspect(
    source: AnyPath,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    plan: bool = False,
    verify: bool = False,
    consumers: Sequence[str] = (),
    on_progress: OnProgress = ignore,
) -> Inspection | PipelineInspection:
    """What a model, pipeline or single .safetensors file holds, from its headers, and what is wrong with it.

    ``plan`` asks the model's library for exact figures. ``verify`` compares every byte with the hashes that qz
    recorded. ``consumers`` names programs (``vllm``, ``sglang`` …, see ``qz inspect --for``) to judge it for. Problems
    are part of the value (``problems``, ``errors``, ``consumers``), not raised.
    """
    from qz.formats.source import local_path
    from qz.quantize.consumers.registry import CONSUMERS
    from qz.quantize.inspection.model import inspect_file, inspect_model, read_folder
    from qz.quantize.inspection.report import Origin

    if unknown := [name for name in consumers if name not in CONSUMERS]:
        raise UsageError(f"--for {unknown[0]} is none of {', '.join(CONSUMERS)}.")
    location = str(source)
    path = local_path(location)
    if path is not None and path.exists() and not path.is_dir() and path.suffix.lower() != ".gguf":
        if subfolder is not None or verify:
            raise UsageError(f"{location} is a file: --subfolder and --verify need the folder that it lies in.")
        from qz.formats.folder import LocalFolder

        path = path.resolve()  # the user named it: a link is followed
        with closing(LocalFolder(path.parent)) as parent:
            parent.allow_pickle = allow_pickle
            return inspect_file(parent, path.name, Origin(location, None, None), consumers=consumers)
    from qz.formats.checkpoint.pipeline import is_pipeline
    from qz.formats.checkpoint.problems import Problem
    from qz.formats.output.record import damaged_record
    from qz.formats.source import opened

    if path is None or plan:
        on_progress(Progress("Reading headers"))
    with opened(location, subfolder, revision, allow_pickle=allow_pickle) as opened_source:
        folder = opened_source.folder
        if (
            max((size for name, size in folder.sizes().items() if name.endswith(".index.json")), default=0)
            > LARGE_INDEX
        ):
            on_progress(Progress("Reading headers"))
        origin = Origin(location, folder.identity().get("commit"), subfolder)
        found: Inspection | PipelineInspection
        if plan:
            on_progress(Progress("Planning"))
        if is_pipeline(folder):
            from qz.quantize.inspection.pipeline import inspect_pipeline

            found = inspect_pipeline(folder, origin, variant, plan=plan, consumers=consumers)
        else:
            found = inspect_model(read_folder(folder, variant), origin, plan=plan, consumers=consumers)
        if verify:
            from qz.quantize.inspection.verification import verify as compare

            found = found.with_verified(*compare(folder, opened_source.root, on_progress))
        else:
            found = found.with_problems(damaged_record(folder))
        return found.with_problems(
            Problem("warning", "hub-cache", location, f"{note}.") for note in opened_source.notes
        )


def load(source: AnyPath, *, subfolder: str | None = None, variant: str | None = None, device: str = "auto") -> Any:
    """A model or a pipeline from a folder, as an object of its library: what qz wrote, or ``save_pretrained``.

    Where ``from_pretrained`` loads it, that is what this calls. Besides, it loads models whose experts are quantized
    (``quantize(experts=True)``), which transformers cannot, and quantized models and pipelines of diffusers without a
    GPU, where diffusers refuses them. ``device`` is a torch device; auto takes the first GPU, if there is one.

    Raises ``qz.QzError``: MissingInput, MalformedInput, Unsupported, UsageError; and what the libraries raise.
    """
    from qz.quantize.loading.load import load as run

    return run(str(source), subfolder, variant, device)


@settings_given_back()
def merge(
    output: AnyPath,
    *,
    overwrite: bool = False,
    push: str | None = None,
    push_subfolder: str | None = None,
    public: bool | None = None,
    fsync: bool = True,
    threads: int | None = None,
    on_progress: OnProgress = ignore,
) -> Merged:
    """Complete ``output`` from what ``quantize(…, part="1/N")`` to ``part="N/N"`` made, after comparing every hash.

    ``push`` publishes it. Where the parts sent their weights there (``push_only``), one commit makes all of it visible,
    and no output is here. Nothing is left of the parts. A merge that was interrupted goes on, and one that is repeated
    has nothing to do. Raises ``qz.QzError``; then the output is as it was, and the parts are kept.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.output.disk import Disk
    from qz.formats.publish.destination import Destination
    from qz.quantize.merge import merge as run

    if push is None and (public is not None or push_subfolder is not None):
        raise UsageError("--public and --push-subfolder are about what --push publishes. Add --push REPO_ID.")
    private = None if public is None else not public
    to = None if push is None else Destination(push, push_subfolder or "", private=private)
    disk = Disk(durable=fsync)
    return run(Path(output), overwrite=overwrite, to=to, disk=disk, threads=threads or 0, progress=on_progress)


@settings_given_back()
def verify(
    output: AnyPath,
    against: AnyPath | None = None,
    *,
    revision: str | None = None,
    importance: AnyPath | None = None,
    allow_pickle: bool = False,
    sample: float | None = None,
    device: str = "auto",
    threads: int | None = None,
    on_progress: OnProgress = ignore,
) -> Verification:
    """Compare what qz wrote, a folder or a repository, with the hashes in its record, or with its source.

    With ``against``, every tensor is computed once more from that source, at ``revision``, with the recorded settings,
    and compared; nothing is written. ``sample`` 0.05 takes weights at random until they have 5 % of the bytes.
    ``importance`` names the file that was used, if one was; ``allow_pickle`` is that of ``quantize``. What differs is
    part of the value (``intact``), not raised.
    """
    from qz.formats.source import opened
    from qz.quantize.verification.verify import verify_against, verify_record

    if against is None and (sample, importance, revision) != (None, None, None):
        raise UsageError("--sample, --importance and --revision belong to --against SOURCE.")
    with opened(str(output)) as found:
        if against is None:
            return verify_record(found, on_progress)
        return verify_against(
            found,
            str(against),
            revision=revision,
            importance=Path(importance) if importance is not None else None,
            allow_pickle=allow_pickle,
            sample=sample,
            device=device,
            threads=threads or 0,
            progress=on_progress,
        )


@settings_given_back()
def push(
    folder: AnyPath,
    repo_id: str,
    *,
    subfolder: str | None = None,
    public: bool | None = None,
    branch: str = "main",
    create_pr: bool = False,
    replace: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    on_progress: OnProgress = ignore,
) -> PushResult:
    """Publish a checkpoint on the Hub: verified first, then weights and config in one commit, with a model card.

    ``public`` True or False decides who may see a new repository (None: private); ``replace`` allows weights that qz
    did not make to be replaced. Raises ``qz.QzError``; then nothing has become visible.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.publish.destination import Destination
    from qz.formats.publish.push import push as send

    private = None if public is None else not public
    to = Destination(repo_id, subfolder or "", branch, create_pr, private, message, replace)
    return send(Path(folder), to, dry_run=dry_run, progress=on_progress)


@settings_given_back()
def calibrate(
    source: AnyPath,
    output: AnyPath,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    text: AnyPath | None = None,
    tokens: int | None = None,
    hessians: bool = False,
    scores: bool = False,
    method: Method | None = None,
    generate: bool = False,
    resume: bool = True,
    device: str = "auto",
    on_progress: OnProgress = ignore,
) -> Calibration:
    """Run a 16-bit transformers model on a text and write the statistics of its linears' inputs to ``output``.

    One block of the model and the hidden states are in memory at a time. ``text`` is a file, by default qz's own text;
    ``tokens`` of it are read. With ``generate`` the model writes the text itself, for which all of it is in memory.
    ``hessians`` adds what ``quantize(…, rounding="gptq")`` needs, in files beside it; ``scores`` how sensitive each
    linear is to being quantized by ``method`` (default: ``Nf4()``), for ``quantize(…, target_size=…)``.
    An interrupted run goes on at the last block that it finished. Raises ``qz.QzError``; then there is no output.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.pipeline import is_pipeline
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.source import opened
    from qz.quantize.calibration.run import CalibrationRequest
    from qz.quantize.calibration.run import calibrate as run

    if method is not None and not scores:
        raise UsageError("A method is for scores: add --scores, or leave the method out.")
    chosen = (method or Nf4()) if scores else None
    own = Path(text) if text is not None else None
    request = CalibrationRequest(Path(output), own, tokens, hessians, device, chosen, generate, resume)
    with opened(str(source), subfolder, revision) as found:
        if is_pipeline(found.folder):
            raise UsageError(f"{found.folder.location} is a pipeline. Name a text encoder of it with --subfolder.")
        tokenizer = _tokenizer_of(found, subfolder)
        return run(open_checkpoint(found.folder, variant), tokenizer, str(source), request, on_progress)


@settings_given_back()
def compare(
    original: AnyPath,
    other: AnyPath,
    *,
    subfolder: str | None = None,
    text: AnyPath | None = None,
    tokens: int | None = None,
    device: str = "auto",
    on_progress: OnProgress = ignore,
) -> Comparison:
    """What quantizing ``original`` to ``other`` changed in its weights, and in what it makes of a text.

    Both run block by block, one after the other. ``subfolder`` is the component of a pipeline in both, where they have
    it. Raises ``qz.QzError``.
    """
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.source import opened
    from qz.quantize.calibration.compare import compare as run

    with opened(str(original), subfolder) as first, opened(str(other), subfolder) as second:
        checkpoints = open_checkpoint(first.folder), open_checkpoint(second.folder)
        chosen = Path(text) if text is not None else None
        names = str(original), str(other)
        return run(*checkpoints, names, _tokenizer_of(first, subfolder), chosen, tokens, device, on_progress)


def _tokenizer_of(source: OpenedSource, subfolder: str | None) -> Folder:
    """Where the tokenizer of a model lies: with it, or in a folder of its own in a pipeline."""
    from qz.formats.checkpoint.pipeline import is_pipeline
    from qz.formats.source import enter

    beside = (subfolder or "").strip("/").replace("text_encoder", "tokenizer")
    in_pipeline = is_pipeline(source.root) and beside in source.root.subfolders()
    return enter(source.root, beside) if in_pipeline else source.folder


def _share(part: str | None, *, measured: bool, pushed: bool) -> Share | None:
    """The part that is asked for, in words or by the environment; None for all."""
    if part is None:
        return None
    from qz.quantize.array_task import parse_part

    if measured:
        raise UsageError("A part does not see the whole model: measure the loss with `qz compare` after the merge.")
    if pushed:
        raise UsageError(
            "Parts are published when they are merged: leave out --push here, and say `qz merge --push`. Or add "
            "--push-only, to send each weight file when it is finished and keep none here."
        )
    return parse_part(part, os.environ)


def _destination(
    push: str | None,
    subfolder: str | None,
    public: bool | None,
    source: OpenedSource,
    loras: Sequence[AdapterFile] = (),
) -> Destination | None:
    """Where the output is published; raises now what would fail after the work."""
    if push is None:
        if public is not None:
            raise UsageError("--public and --private say who may see what --push publishes. Add --push REPO_ID.")
        if subfolder is not None:
            raise UsageError("--push-subfolder says where --push publishes. Add --push REPO_ID.")
        return None
    from qz.formats.publish.destination import Destination
    from qz.formats.publish.push import require_possible

    to = Destination(push, subfolder or "", private=None if public is None else not public)
    require_possible(to, source_private=_is_restricted(source, loras))
    return to


def _is_restricted(source: OpenedSource, loras: Sequence[AdapterFile]) -> bool:
    """Whether not everyone may see something that the output is made of."""
    from qz.formats.source import is_restricted

    return any(map(is_restricted, [source.folder, *(lora.folder for lora in loras)]))


def _publication(
    to: Destination | None,
    source: OpenedSource,
    if_exists: IfExists,
    on_progress: OnProgress,
    loras: Sequence[AdapterFile] = (),
) -> Publication:
    """Where the output goes while it is made."""
    if to is None:
        raise UsageError("--push-only keeps no output here, so it needs the repository to publish in: --push REPO_ID.")
    if if_exists != "error":
        raise UsageError("--if-exists and --overwrite are about an output here, which --push-only does not make.")
    from qz.formats.publish.publication import Publication

    return Publication(to, source_private=_is_restricted(source, loras), progress=on_progress)


def _published(
    done: Converted,
    to: Destination | None,
    source: OpenedSource,
    on_progress: OnProgress,
    loras: Sequence[AdapterFile] = (),
) -> Converted:
    """The report of a conversion, with what is to be told of its source, and of the push, if one was asked for."""
    from qz.formats.publish.push import push as send

    done = replace(done, notes=(*done.notes, *source.notes))
    if to is None or getattr(done, "dry_run", False) or done.pushed is not None or getattr(done, "share", None):
        return done
    pushed = send(Path(done.output), to, source_private=_is_restricted(source, loras), progress=on_progress)
    return replace(done, pushed=pushed)
