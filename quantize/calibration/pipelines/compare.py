"""``qz compare`` of pipelines: both draw the same prompts from the same noise, and the denoisers are compared twice.

At each step of the original, the other's denoiser is given what the original's was given: the error of its output, and
of what its blocks return. And each pipeline goes its own way to its own last latents.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qz import MalformedInput, MissingInput, Unsupported
from qz.formats.checkpoint.pipeline import Pipeline
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.malformed import quoted_names
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.block_errors import BlockErrors, RelativeError
from qz.quantize.calibration.compare import Comparison, OutputError, TimestepError
from qz.quantize.calibration.pipelines.calibrate import dtype_in, whole_warnings
from qz.quantize.calibration.pipelines.components import Models, opened_models
from qz.quantize.calibration.pipelines.denoising import Call, Drawing, Drawn, draw
from qz.quantize.calibration.pipelines.replay import replay
from qz.quantize.calibration.pipelines.states import states_of
from qz.quantize.compute.run_device import run_device
from qz.quantize.planning.dequantization import plan_dequantization
from qz.quantize.planning.unquantized import refuse_quantized
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.loss import joined
from qz.quantize.streaming.measuring.measure import AgainstOriginal

if TYPE_CHECKING:
    from qz.quantize.streaming.measuring.loss import Loss

BLOCK_PROMPTS = 2
"""Of so many prompts what each block returns waits in a file."""


def with_component(pipeline: Pipeline, name: str, checkpoint: Checkpoint) -> Pipeline:
    """The pipeline with another checkpoint in the place of one component. Raises MalformedInput for another model, and
    MissingInput for no model."""
    found = next((each for each in pipeline.components if each.name == name), None)
    if found is None or found.checkpoint is None:
        names = [each.name for each in pipeline.components if each.checkpoint is not None]
        raise MissingInput(
            f"{pipeline.folder.location} has no component {name} with weights. It has {quoted_names(names, 8)}."
        )
    if checkpoint.architecture != found.checkpoint.architecture:
        raise MalformedInput(
            f"{checkpoint.folder.location} is a {checkpoint.architecture}, and {name} of {pipeline.folder.location} "
            f"a {found.checkpoint.architecture}: these are two different models. Name the original that was quantized."
        )
    own = replace(found, folder=checkpoint.folder, checkpoint=replace(checkpoint, class_module=found.library))
    return replace(pipeline, components=tuple(own if each is found else each for each in pipeline.components))


def compare(
    original: Pipeline,
    other: Pipeline,
    only: str | None,
    names: tuple[str, str],
    drawing: Drawing,
    text: str,
    device: str,
    progress: OnProgress,
) -> Comparison:
    """Compare a pipeline with what bitsandbytes made of it, or of its component ``only``. Raises what reading and
    running raise."""
    begun = time.monotonic()
    for pipeline in (original, other):
        pipeline.require_read()
    where, dtype = run_device(device, dtype_in(original))
    measures = _measures(original, other, only)
    with tempfile.TemporaryDirectory(prefix="qz-") as place:
        with opened_models(original, dtype, where, only) as models:
            warnings = models.warnings
            drawn = draw(models, drawing, "Generating with the original", progress)
            denoisers = _denoisers(models, drawn, only)
            blocks = {name: BlockErrors(Path(place, name), states_of, _some(drawn.calls[name])) for name in denoisers}
            outputs = {
                name: _outputs(models, name, drawn, blocks[name], "Running the original", progress)
                for name in denoisers
            }
        with opened_models(other, dtype, where, only) as models:
            changed = draw(models, drawing, "Generating with the other", progress)
            other_outputs = {
                name: _outputs(models, name, drawn, blocks[name], "Running the other", progress, compare=True)
                for name in denoisers
            }
    progress(Progress("Comparing weights"))
    losses: dict[str, Loss] = {}
    for name, (measure, plan) in measures.items():
        losses[name] = measure.alone(plan, Settings(None, device=device))
    for pipeline in (original, other):
        pipeline.check()
    pairs = {name: list(zip(drawn.calls[name], outputs[name], other_outputs[name], strict=True)) for name in denoisers}
    return Comparison(
        original=names[0],
        other=names[1],
        architecture=models.class_name,
        text=text,
        tokens=0,
        sequences=len(drawing.prompts),
        device=str(where),
        dtype=str(dtype).removeprefix("torch."),
        loss=joined(losses),
        seconds=time.monotonic() - begun,
        warnings=(*dict.fromkeys((*warnings, *models.warnings)), *whole_warnings(drawn.whole | changed.whole)),
        blocks={f"{name}.{path}": error for name in denoisers for path, error in blocks[name].means().items()},
        steps=drawing.steps,
        resolution=drawn.resolution,
        seed=drawing.seed,
        denoiser=_error([pair for each in pairs.values() for pair in each]),
        timesteps=tuple(error for name, each in pairs.items() for error in _by_timestep(name, each)),
        latents=_error([(n, drawn.latents[n], changed.latents[n]) for n in sorted(drawn.latents)]),
    )


def _measures(original: Pipeline, other: Pipeline, only: str | None) -> dict[str, tuple[AgainstOriginal, Any]]:
    """By component that is quantized in the other: its original, and the plan that it is dequantized by.

    Raises Unsupported where there is none, or where the original is quantized, MalformedInput for other models.
    """
    if original.class_name != other.class_name:
        raise MalformedInput(
            f"{original.folder.location} is a {original.class_name}, and {other.folder.location} a "
            f"{other.class_name}: these are two different pipelines. Name the original that was quantized."
        )
    for each in original.components:
        if each.checkpoint is not None:
            refuse_quantized(each.checkpoint)
    first = {each.name: each.checkpoint for each in original.components if each.checkpoint is not None}
    found = {}
    for each in other.components:
        if each.checkpoint is None or (each.quantization is None and each.name != only):
            continue
        before = first.get(each.name)
        if before is None:
            raise MalformedInput(
                f"{original.folder.location} has no weights of {each.name}, which {other.folder.location} has: these "
                "are two different pipelines. Name the original that was quantized."
            )
        plan = plan_dequantization(each.checkpoint, Settings(None))
        measure = AgainstOriginal(before)
        measure.check(plan)
        found[each.name] = measure, plan
    if not found:
        raise Unsupported(
            f"No component of {other.folder.location} is quantized: there is nothing to compare. Name one that is."
        )
    return found


def _denoisers(models: Models, drawn: Drawn, only: str | None) -> list[str]:
    """The models of diffusers that were called. Raises Unsupported where ``only`` was not, or there is none."""
    found = [name for name in drawn.calls if models.is_denoiser(name)]
    found = [name for name in found if only in (None, name)]
    if not found:
        raise Unsupported(
            f"{models.where}: {models.class_name} does not use {only or 'a denoiser'}: there is nothing to compare."
        )
    return found


def _some(calls: Sequence[Call]) -> frozenset[int]:
    """Numbers of the calls whose blocks are compared."""
    return frozenset(number for number, call in enumerate(calls) if call.prompt < BLOCK_PROMPTS)


def _outputs(
    models: Models,
    name: str,
    drawn: Drawn,
    blocks: BlockErrors,
    task: str,
    progress: OnProgress,
    *,
    compare: bool = False,
) -> list[torch.Tensor]:
    """What a denoiser returns of each call, float32 on the CPU."""
    whole = name in drawn.whole
    found: dict[int, torch.Tensor] = {}

    def used(number: int, answer: Any) -> None:
        found[number] = states_of(answer).float().cpu()

    # Unless blocks run one by one, it is not known which call a block belongs to.
    hooks = [] if whole else blocks.watch(models.model(name), compare=compare)
    try:
        replay(models, name, drawn.calls[name], task, progress, whole=whole, entering=blocks.entering, used=used)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[number] for number in sorted(found)]


Pair = tuple[Any, torch.Tensor, torch.Tensor]
"""A call or the number of a prompt, what comes of it in the original, and in the other."""


def _error(pairs: Sequence[Pair]) -> OutputError:
    """The mean over prompts of the mean over each one's pairs."""
    relative: dict[int, RelativeError] = {}
    cosines: list[float] = []
    for which, before, after in pairs:
        prompt = which.prompt if isinstance(which, Call) else which
        if before.shape != after.shape:
            raise MalformedInput(
                "The denoisers return different shapes: these are two different models. Name the original that was "
                "quantized."
            )
        x, y = (each.double().reshape(1, -1) for each in (before, after))
        relative.setdefault(prompt, RelativeError()).add(x, y)
        cosines.append(1 - float(torch.nn.functional.cosine_similarity(x, y)))
    each = [error.mean for error in relative.values()]
    noise = float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    return OutputError(sum(each) / len(each), noise, sum(cosines) / len(cosines))


def _by_timestep(name: str, pairs: Sequence[Pair]) -> list[TimestepError]:
    grouped: dict[float, list[Pair]] = {}
    count: dict[int, int] = {}
    for pair in pairs:
        call = pair[0]
        count[call.prompt] = count.get(call.prompt, 0) + 1
        grouped.setdefault(call.timestep if call.timestep is not None else count[call.prompt], []).append(pair)
    return [TimestepError(name, timestep, _error(each)) for timestep, each in grouped.items()]
