"""``qz calibrate`` of a pipeline: it draws from prompts, then each of its models meets all that it was given again.

The second time all prompts and steps go through a block together, so that its statistics are whole when it is given up,
as for a model that reads text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qz import Unsupported
from qz.formats.checkpoint.pipeline import Pipeline
from qz.progress import OnProgress
from qz.quantize.calibration.pipelines.components import Models, opened_models, plain_dtype
from qz.quantize.calibration.pipelines.denoising import Call, Drawing, draw
from qz.quantize.calibration.pipelines.prompts import prompts_of
from qz.quantize.calibration.pipelines.replay import replay
from qz.quantize.calibration.recorder import Recorder
from qz.quantize.calibration.run import Calibration, CalibrationRequest, refuse_existing, token_warnings
from qz.quantize.calibration.statistics import HESSIAN, HessianPlace, InputSums, write_hessians, write_statistics
from qz.quantize.compute.run_device import run_device
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
    files = _HessianFiles(request.output)
    with opened_models(pipeline, dtype, device) as models:
        drawn = draw(models, drawing, "Drawing", progress)
        if only is not None and only not in drawn.calls:
            raise Unsupported(f"{models.where}: {models.class_name} draws without {only}: nothing can be recorded.")
        chosen = [name for name in drawn.calls if only in (None, name)]
        sums: dict[str, InputSums] = {}
        places: dict[str, HessianPlace] = {}
        try:
            for name in chosen:
                calls = drawn.calls.pop(name)
                found = _record(models, name, calls, name in drawn.whole, request.hessians, files, progress)
                sums |= found[0]
                places |= found[1]
            refuse_existing(request.output)
            told = {
                "architecture": models.class_name,
                "prompts": str(len(drawing.prompts)),
                "steps": str(drawing.steps),
                **({"resolution": str(drawn.resolution)} if drawn.resolution is not None else {}),
                "seed": str(drawing.seed),
                "text": "default" if request.text is None else "own",
            }
            write_statistics(request.output, sums, told, places, files.hashes)
        except BaseException:
            files.remove()
            raise
        unseen = tuple(name for name, each in sums.items() if each.tokens == 0)
        tokens = max((each.tokens for each in sums.values()), default=0)
        return Calibration(
            source,
            str(request.output),
            models.class_name,
            request.text_name,
            tokens,
            len(drawing.prompts),
            len(sums),
            unseen,
            tuple(files.hashes),
            files.bytes,
            str(device),
            str(dtype).removeprefix("torch."),
            models.bytes_read,
            time.monotonic() - begun,
            (*whole_warnings(drawn.whole), *token_warnings(tokens, unseen, hessians=request.hessians)),
            steps=drawing.steps,
            resolution=drawn.resolution,
            seed=drawing.seed,
            components=tuple(chosen),
            weights_at_once=drawn.at_once,
        )


def whole_warnings(whole: frozenset[str]) -> tuple[str, ...]:
    return tuple(f"{name} cannot be run block by block: all of its weights were in memory" for name in sorted(whole))


def _record(
    models: Models,
    name: str,
    calls: Sequence[Call],
    whole: bool,
    hessians: bool,
    files: _HessianFiles,
    progress: OnProgress,
) -> tuple[dict[str, InputSums], dict[str, HessianPlace]]:
    """The sums of a component's linears, and where its Hessians lie, both by COMPONENT/WEIGHT."""
    recorder = Recorder(models.weights[name].runnable.linears, None, hessians=hessians)

    def write() -> None:
        files.write(name, recorder.take_hessians())

    try:
        replay(models, name, calls, f"Calibrating {name}", progress, whole=whole, visited=write)
        write()
    finally:
        recorder.close()
    places = {
        f"{name}/{weight}": HessianPlace(files.places[f"{name}/{first}"], f"{name}/{first}{HESSIAN}")
        for weight, first in recorder.first.items()
    }
    return {f"{name}/{weight}": each for weight, each in recorder.input_sums().items()}, places


class _HessianFiles:
    """Files of Hessians beside an output: one for each block that has some."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.hashes: dict[str, str] = {}
        self.places: dict[str, str] = {}
        """COMPONENT/WEIGHT → the file of its Hessian."""

    def write(self, component: str, hessians: Mapping[str, np.ndarray[Any, Any]]) -> None:
        if not hessians:
            return
        file = f"{self.output.stem}.hessians-{len(self.hashes) + 1:05}.safetensors"
        path = self.output.with_name(file)
        refuse_existing(path)
        named = {f"{component}/{name}": each for name, each in hessians.items()}
        self.hashes[file] = write_hessians(path, named)
        self.places |= dict.fromkeys(named, file)

    @property
    def bytes(self) -> int:
        return sum(self.output.with_name(file).stat().st_size for file in self.hashes)

    def remove(self) -> None:
        for file in self.hashes:
            self.output.with_name(file).unlink(missing_ok=True)
