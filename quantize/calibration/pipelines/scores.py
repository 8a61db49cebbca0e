"""How sensitive the linears of a pipeline's denoisers are to being quantized: see ``qz.quantize.calibration.scores``.

What is lost is |Δ|² / |y|² of the denoiser's output y, on some of the calls that were made while the pipeline drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qz.progress import OnProgress
from qz.quantize.calibration.block_errors import RelativeError
from qz.quantize.calibration.pipelines import memory
from qz.quantize.calibration.pipelines.components import Models
from qz.quantize.calibration.pipelines.denoising import Drawn
from qz.quantize.calibration.pipelines.states import states_of
from qz.quantize.calibration.running.blocks import parts_of
from qz.quantize.calibration.running.nested import changed
from qz.quantize.calibration.scores import quantized_names, score
from qz.quantize.compute.arithmetic import Arithmetic
from qz.quantize.methods import Method
from qz.quantize.planning.budget.sensitivity import LossName, Scores

CALLS, SOME = 16, 4
"""So many are looked at, and each block is tried alone on so many of these."""


class OutputJudge:
    """Keeps the outputs of the original in memory: latents are small."""

    loss: LossName = "output"

    def __init__(self) -> None:
        self.tokens = 0
        self._kept: dict[int, torch.Tensor] = {}

    def keep(self, number: int, answer: Any) -> None:
        states = states_of(answer)
        self.tokens += len(states)
        self._kept[number] = states.reshape(1, -1).cpu()

    def lost(self, number: int, answer: Any) -> float:
        found = RelativeError()
        found.add(self._kept[number], states_of(answer).reshape(1, -1).cpu())
        return found.mean


def score_denoisers(
    models: Models, drawn: Drawn, only: str | None, method: Method, arithmetic: Arithmetic, progress: OnProgress
) -> dict[str, Scores]:
    """By component. One that cannot be run block by block, or of which nothing is quantized, is left out. Raises what
    reading and running raise."""
    found = {}
    for name, calls in drawn.calls.items():
        if only not in (None, name) or not models.is_denoiser(name) or name in drawn.whole:
            continue
        weights = models.again(name)
        model = weights.runnable.model
        names = quantized_names(weights.checkpoint, weights.runnable, method)
        if not names:
            continue
        memory.require(memory.at_once([model], parts_of(model)), models.device, f"{name} of {models.where}")
        inputs = [changed(dict(call.arguments), in_float32) for call in spread(calls, CALLS)]
        some = spread(range(len(inputs)), SOME)
        found[name] = score(weights, inputs, some, OutputJudge(), states_of, names, method, arithmetic, progress)
    return found


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many, from all over the sequence: calls come step after step, so of several steps and prompts."""
    count = min(most, len(values))
    return [values[(2 * number + 1) * len(values) // (2 * count)] for number in range(count)]


def in_float32(value: torch.Tensor) -> torch.Tensor:
    """A tensor of floats as float32; others as they are."""
    return value.float() if value.is_floating_point() else value
