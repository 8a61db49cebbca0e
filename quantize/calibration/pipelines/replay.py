"""A model of a pipeline is given again what it was given while the pipeline drew: all of it goes through a block
together, so that the weights are read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qz.progress import OnProgress, Progress
from qz.quantize.calibration.pipelines import memory
from qz.quantize.calibration.pipelines.components import Models
from qz.quantize.calibration.pipelines.denoising import Call
from qz.quantize.calibration.running.blocks import BlockPass, Entering, Replay
from qz.quantize.libraries.transformers.runnable import running


def replay(
    models: Models,
    name: str,
    calls: Sequence[Call],
    task: str,
    progress: OnProgress,
    *,
    whole: bool,
    visited: Callable[[str], None] | None = None,
    entering: Entering | None = None,
    used: Callable[[int, Any], None] | None = None,
    known: Replay | None = None,
) -> None:
    """Make the ``calls`` of the component ``name`` once more, block by block unless ``whole``.

    ``visited``, ``entering``, ``used`` and ``known``, its ``replay``, are called as by ``BlockPass``. Raises TryAgain
    where the weights that must be in memory together do not fit.
    """
    weights = models.weights[name]
    model = weights.runnable.model
    parts: set[str] = set()

    def tell(part: str) -> None:
        parts.add(part)
        if visited is not None:
            visited(part)
        progress(Progress(task, len(parts), len(steps.parts), unit="block"))

    steps = BlockPass(model, weights, tell, entering=entering, replay=known)
    if whole:
        steps.parts = {}
    memory.require(memory.at_once([model], steps.parts), models.device, f"{name} of {models.where}")
    try:
        with running(type(model).__name__, models.where):
            weights.load_rest(steps.parts)
            steps.run([call.arguments for call in calls], used)
    finally:
        weights.release("", model)
