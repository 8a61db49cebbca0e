"""``calibrate`` and ``compare``: what running a model shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qz import UsageError
from qz.api.effects import Asked
from qz.api.paths import AnyPath
from qz.formats.global_settings import settings_restored
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.methods import Method, Nf4

if TYPE_CHECKING:
    from qz.formats.checkpoint.pipeline import Pipeline
    from qz.formats.files.folder import Folder
    from qz.formats.source import OpenedSource
    from qz.quantize.calibration.compare import Comparison
    from qz.quantize.calibration.run import Calibration

COMPARED_SEED = 1_000_000
"""Of the noise that compared pipelines begin with, which is not that of calibration."""


@settings_restored()
def calibrate(
    source: AnyPath,
    output: AnyPath,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    text: AnyPath | None = None,
    tokens: int | None = None,
    hessians: bool = False,
    experts: bool = False,
    scores: bool = False,
    method: Method | None = None,
    generate: bool = False,
    resume: bool = True,
    steps: int | None = None,
    resolution: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress = ignore,
) -> Calibration:
    """Run a 16-bit model of transformers on a text, or a pipeline of diffusers on prompts, and write the statistics of
    its linears' inputs to ``output``.

    One block of the model and the hidden states are in memory at a time. ``text`` is a file, by default qz's own text;
    ``tokens`` of it are read. With ``generate`` the model writes the text itself, for which all of it is in memory.
    ``experts`` records those of an MoE model, too, for ``quantize(…, experts=True)``.
    ``hessians`` adds what ``quantize(…, rounding="gptq")`` needs, in files beside it; ``scores`` how sensitive each
    linear is to being quantized by ``method`` (default: ``Nf4()``), for ``quantize(…, target_size=…)``.
    An interrupted run goes on at the last block that it finished.

    A pipeline is run on prompts, the lines of ``text`` or 16 of qz's own. Each is denoised in ``steps`` (default: 4) at
    ``resolution`` (default: 256, or what the pipeline is made for if that is less), from noise of ``seed``. All models
    that take part are recorded, or the component ``subfolder`` of a pipeline; ``scores`` are of its denoisers and text
    encoders. It takes no ``tokens`` and no ``generate``. An interrupted run goes on after the last step, or block, that
    it finished.

    Raises ``qz.QzError``; then there is no output.
    """
    asked = Asked.of(calibrate, locals())
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.source import local_path, opened
    from qz.quantize.calibration.run import CalibrationRequest
    from qz.quantize.calibration.run import calibrate as run

    asked.require(scores=scores, hub=local_path(str(source)) is None)
    chosen = (method or Nf4()) if scores else None
    own = Path(text) if text is not None else None
    request = CalibrationRequest(
        Path(output), own, tokens, hessians, device, chosen, generate, resume, steps, resolution, seed, experts
    )
    with opened(str(source), subfolder, revision, allow_pickle=allow_pickle) as found:
        asked.require(folder=found.file is None)
        component = prompted_component(found, variant)
        asked.require(reads_text=component is None, reads_prompts=component is not None)
        if component is not None:
            from qz.quantize.calibration.pipelines.calibrate import calibrate as run_pipeline

            with opened_pipeline(found, variant) as pipeline:
                done = run_pipeline(pipeline, component or None, str(source), request, on_progress)
        else:
            tokenizer = tokenizer_of(found, subfolder)
            done = run(open_checkpoint(found.folder, variant), tokenizer, str(source), request, on_progress)
        return replace(done, warnings=(*done.warnings, *found.notes))


@settings_restored()
def compare(
    original: AnyPath,
    other: AnyPath,
    *,
    subfolder: str | None = None,
    allow_pickle: bool = False,
    text: AnyPath | None = None,
    tokens: int | None = None,
    steps: int | None = None,
    resolution: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    on_progress: OnProgress = ignore,
) -> Comparison:
    """What quantizing ``original`` to ``other`` changed in its weights, and in what it makes of a text or of prompts.

    Both run block by block, one after the other. ``subfolder`` is the component of a pipeline in both, where they have
    it. Pipelines are run as by ``calibrate``, from other noise. Raises ``qz.QzError``.
    """
    asked = Asked.of(compare, locals())
    on_progress(Progress("Reading headers"))
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.source import opened

    with opened(str(original), subfolder, allow_pickle=allow_pickle) as first:
        component = prompted_component(first, None)
        chosen = Path(text) if text is not None else None
        asked.require(reads_text=component is None, reads_prompts=component is not None)
        if component is not None:
            how = chosen, steps, resolution, COMPARED_SEED if seed is None else seed
            with opened(str(other), allow_pickle=allow_pickle) as second:
                done = _compare_pipelines(first, second, component, how, device, on_progress)
        else:
            with opened(str(other), subfolder, allow_pickle=allow_pickle) as second:
                checkpoints = open_checkpoint(first.folder), open_checkpoint(second.folder)
                from qz.quantize.calibration.compare import compare as run  # torch, once there is something to compare

                names = str(original), str(other)
                done = run(*checkpoints, names, tokenizer_of(first, subfolder), chosen, tokens, device, on_progress)
        return replace(done, warnings=(*done.warnings, *first.notes, *second.notes))


def _compare_pipelines(
    first: OpenedSource,
    second: OpenedSource,
    component: str,
    how: tuple[Path | None, int | None, int | None, int],
    device: str,
    on_progress: OnProgress,
) -> Comparison:
    """``second``: a pipeline, or the component alone."""
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.files.folder import is_pipeline
    from qz.formats.source import enter
    from qz.quantize.calibration.pipelines.calibrate import drawing_of
    from qz.quantize.calibration.pipelines.compare import compare as run
    from qz.quantize.calibration.pipelines.compare import with_component
    from qz.quantize.calibration.run import CalibrationRequest

    text, steps, resolution, seed = how
    request = CalibrationRequest(Path(), text, device=device, steps=steps, resolution=resolution, seed=seed)
    drawing = drawing_of(request)
    names = first.location, second.location
    with ExitStack() as stack:
        original = stack.enter_context(opened_pipeline(first, None))
        if is_pipeline(second.root) and not component:
            other = stack.enter_context(opened_pipeline(second, None))
        elif not component:
            raise UsageError(
                f"{second.folder.location} is no pipeline, and {first.folder.location} is one. Name the component that "
                "was quantized with --subfolder."
            )
        else:
            inside = is_pipeline(second.root)
            folder = enter(second.root, component) if inside else second.folder
            if inside:
                stack.callback(folder.close)
            other = with_component(original, component, open_checkpoint(folder))
        return run(original, other, component or None, names, drawing, request.text_name, device, on_progress)


def prompted_component(source: OpenedSource, variant: str | None) -> str | None:
    """The component of a pipeline that is to be run with it, empty for the whole of it; None for a model that reads
    text."""
    from qz.formats.checkpoint.survey import open_checkpoint
    from qz.formats.files.folder import is_pipeline

    if is_pipeline(source.folder):
        return ""
    inside = source.folder is not source.root and is_pipeline(source.root)
    if not inside or open_checkpoint(source.folder, variant).library != "diffusers":
        return None
    return (source.subfolder or "").strip("/")


@contextmanager
def opened_pipeline(source: OpenedSource, variant: str | None) -> Iterator[Pipeline]:
    """The pipeline that a source is, or is a component of; its components' folders are closed afterwards."""
    from qz.formats.checkpoint.pipeline import open_pipeline
    from qz.formats.files.folder import is_pipeline

    pipeline = open_pipeline(source.folder if is_pipeline(source.folder) else source.root, variant)
    try:
        yield pipeline
    finally:
        for component in pipeline.components:
            component.folder.close()


def tokenizer_of(source: OpenedSource, subfolder: str | None) -> Folder:
    """Where the tokenizer of a model lies: with it, or in a folder of its own in a pipeline."""
    from qz.formats.files.folder import is_pipeline
    from qz.formats.source import enter

    beside = (subfolder or "").strip("/").replace("text_encoder", "tokenizer")
    in_pipeline = is_pipeline(source.root) and beside in source.root.subfolders()
    return enter(source.root, beside) if in_pipeline else source.folder
