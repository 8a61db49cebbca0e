"""``qz calibrate`` of a pipeline: it draws from prompts, and the inputs of its models' linears are summed up.

For Hessians each model meets all that it was given once more, all prompts and steps going through a block together, so
that the Hessians of a block are whole when it is given up, as for a model that reads text.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from qz import Unsupported
from qz.formats.checkpoint.pipeline import Pipeline
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.hessian_files import HessianFiles, refuse_existing
from qz.quantize.calibration.pipelines.components import Models, opened_models, plain_dtype
from qz.quantize.calibration.pipelines.denoising import Drawing, Drawn, draw
from qz.quantize.calibration.pipelines.prompts import prompts_of
from qz.quantize.calibration.pipelines.replay import replay
from qz.quantize.calibration.pipelines.resume import CallStore
from qz.quantize.calibration.pipelines.scores import score_denoisers
from qz.quantize.calibration.pipelines.text_scores import score_text_encoders
from qz.quantize.calibration.recording import Recording
from qz.quantize.calibration.run import Calibration, CalibrationRequest, token_warnings
from qz.quantize.calibration.running.blocks import blocks_of
from qz.quantize.calibration.running.recorder import Recorder
from qz.quantize.calibration.running.unfinished import Unfinished, unfinished
from qz.quantize.compute.devices import arithmetic_on
from qz.quantize.compute.run_device import run_device
from qz.quantize.importance.hessian_reader import HessianPlace
from qz.quantize.importance.statistics import InputSums, write_statistics
from qz.quantize.libraries.examine import library_versions
from qz.quantize.planning.budget.sensitivity import Scores
from qz.quantize.planning.unquantized import refuse_quantized

STEPS = 4


def drawing_of(request: CalibrationRequest) -> Drawing:
    """What the request asks to be drawn. Raises as ``prompts_of``."""
    steps = request.steps or STEPS
    return Drawing(prompts_of(request.text, steps), steps, request.seed, request.resolution)


def dtype_in(pipeline: Pipeline) -> str:
    """The dtype of the largest component."""
    models = [each for each in pipeline.components if each.checkpoint is not None]
    if not models:
        raise Unsupported(f"{pipeline.folder.location} has no component with weights. Get a complete copy.")
    return plain_dtype(max(models, key=lambda each: each.bytes))


def calibrate(
    pipeline: Pipeline, only: str | None, source: str, request: CalibrationRequest, progress: OnProgress
) -> Calibration:
    """Record the inputs of every model that draws, or of the component ``only``, and write the file, which is complete
    or absent. Raises what reading and running raise."""
    begun = time.monotonic()
    refuse_existing(request.output)
    drawing = drawing_of(request)
    for component in pipeline.components:
        if component.checkpoint is not None and only in (None, component.name):
            refuse_quantized(component.checkpoint)
    device, dtype = run_device(request.device, dtype_in(pipeline))
    with (
        opened_models(pipeline, dtype, device, only) as models,
        unfinished(request.output, resume=request.resume) as kept,
    ):
        kept.open(_fingerprint(pipeline, only, models, drawing, request, str(dtype)))
        if kept.count:
            progress(Progress("Generating", kept=(kept.count, 0), unit="step"))
        kept.begin([])
        drawn, sums = _draw(models, only, drawing, request, kept, progress)
        chosen = [name for name in drawn.calls if only in (None, name)]
        files = HessianFiles(request.output, kept)
        places: dict[str, HessianPlace] = {}
        for name in chosen if request.hessians else ():
            recording = _record(models, name, drawn, files, progress)
            sums |= recording.input_sums()
            places |= recording.places()
        scores = _scores(models, drawing, drawn, only, request, progress)
        unscored = [name for name in chosen if request.scores and name in drawn.whole]
        pipeline.check()
        refuse_existing(request.output)
        about = _about(models, drawing, drawn, request)
        write_statistics(request.output, sums, about, places, files.hashes, component_scores=scores)
        kept.remove()
        unseen = tuple(name for name, each in sums.items() if each.tokens == 0)
        tokens = max((each.tokens for each in sums.values()), default=0)
        return Calibration(
            source=source,
            output=str(request.output),
            architecture=models.class_name,
            text=request.text_name,
            tokens=tokens,
            sequences=len(drawing.prompts),
            linears=len(sums),
            unseen=unseen,
            hessian_files=tuple(files.hashes),
            hessian_bytes=files.nbytes,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            bytes_read=models.bytes_read,
            seconds=time.monotonic() - begun,
            warnings=(
                *models.warnings,
                *whole_warnings(drawn.whole, unscored),
                *token_warnings(tokens, unseen, hessians=request.hessians),
            ),
            component_scores=scores,
            resumed=kept.count > 0,
            steps=drawing.steps,
            resolution=drawn.resolution,
            seed=drawing.seed,
            components=tuple(chosen),
            weights_at_once=drawn.at_once,
        )


def _about(models: Models, drawing: Drawing, drawn: Drawn, request: CalibrationRequest) -> dict[str, str]:
    """What the file of statistics says of how it was made."""
    return {
        "architecture": models.class_name,
        "prompts": str(len(drawing.prompts)),
        "steps": str(drawing.steps),
        **({"resolution": str(drawn.resolution)} if drawn.resolution is not None else {}),
        "seed": str(drawing.seed),
        "text": "default" if request.text is None else "own",
    }


def _fingerprint(
    pipeline: Pipeline, only: str | None, models: Models, drawing: Drawing, request: CalibrationRequest, dtype: str
) -> dict[str, Any]:
    """What must be the same for a run to go on where another was interrupted."""
    from qz import __version__

    return {
        "source": pipeline.folder.identity(),
        "components": {each.name: each.folder.identity() for each in pipeline.components},
        "only": only,
        "class": models.class_name,
        "dtype": dtype,
        "device": str(models.device),
        "drawing": asdict(drawing),
        "hessians": request.hessians,
        "versions": {"qz": __version__, **library_versions()},
    }


def _draw(
    models: Models,
    only: str | None,
    drawing: Drawing,
    request: CalibrationRequest,
    kept: Unfinished,
    progress: OnProgress,
) -> tuple[Drawn, dict[str, InputSums]]:
    """What was drawn, and unless Hessians are wanted, which hold them, the sums by COMPONENT/WEIGHT."""
    recorded = [] if request.hessians else [name for name in models.weights if only in (None, name)]
    calls = CallStore(kept, models, len(drawing.prompts), recorded)
    try:
        drawn = draw(models, drawing, "Generating", progress, calls)
        calls.finish()
    finally:
        calls.close()
    if only is not None and only not in drawn.calls:
        raise Unsupported(f"{models.where}: {models.class_name} does not use {only}: choose another --subfolder.")
    sums = {
        f"{name}/{weight}": each
        for name, recorder in calls.recorders.items()
        if name in drawn.calls
        for weight, each in recorder.input_sums().items()
    }
    return drawn, sums


def _scores(
    models: Models,
    drawing: Drawing,
    drawn: Drawn,
    only: str | None,
    request: CalibrationRequest,
    progress: OnProgress,
) -> dict[str, Scores]:
    """Of the denoisers and text encoders, if they are asked for. Raises Unsupported where none can be scored."""
    method = request.scores
    if method is None:
        return {}
    arithmetic = arithmetic_on(request.device)
    found = score_denoisers(models, drawn, only, method, arithmetic, progress)
    found |= score_text_encoders(models, drawing, drawn, only, method, arithmetic, progress)
    if not found:
        raise Unsupported(
            f"{models.where}: {models.class_name} has nothing that is run block by block and quantized, so that there "
            "is nothing to score. Leave out --scores."
        )
    return found


def _record(models: Models, name: str, drawn: Drawn, files: HessianFiles, progress: OnProgress) -> Recording:
    """What the linears of a component are given, with Hessians."""
    recorder = Recorder(models.weights[name].runnable.linears, None, hessians=True)
    blocks = {} if name in drawn.whole else blocks_of(models.model(name))
    recording = Recording(recorder, files, blocks, models.device, f"{name}/")
    try:
        replay(
            models,
            name,
            drawn.calls[name],
            f"Calibrating {name}",
            progress,
            whole=name in drawn.whole,
            visited=recording.visited,
            entering=recording.entering,
            known=recording.known,
        )
        recording.write_hessians()
    finally:
        recording.close()
    return recording


def whole_warnings(whole: frozenset[str], unscored: Collection[str] = ()) -> tuple[str, ...]:
    """``unscored``: those among them that ``--scores`` leave out."""
    told = {name: ", and it has no scores" if name in unscored else "" for name in sorted(whole)}
    return tuple(
        f"{name} cannot be run block by block: all of its weights were in memory{more}" for name, more in told.items()
    )
