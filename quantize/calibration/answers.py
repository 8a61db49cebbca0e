"""What a model answers to a text: one run keeps its answers in files, another is compared with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qz import MalformedInput, Unsupported
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.block_errors import BlockErrors
from qz.quantize.calibration.running.blocks import BlockPass
from qz.quantize.calibration.running.weights import Weights
from qz.quantize.libraries.transformers.runnable import Runnable, running

ROWS = 64
"""Tokens whose predictions are compared at a time, in float64."""


@dataclass(slots=True)
class Divergence:
    """Per sequence: the mean of what was found over its tokens."""

    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    surprise: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    """Of the next token, in nats: by the original, by the other."""
    cosine: list[float] = field(default_factory=list)

    @property
    def kl_error(self) -> float | None:
        """The standard error of the mean over sequences; None for fewer than two."""
        return float(np.std(self.kl, ddof=1) / math.sqrt(len(self.kl))) if len(self.kl) > 1 else None

    @property
    def perplexities(self) -> tuple[float | None, float | None]:
        """Of the original, and of the other."""
        one, other = (math.exp(sum(each) / len(each)) if each else None for each in self.surprise)
        return one, other


def answer(
    model: Runnable,
    weights: Weights,
    rows: Sequence[list[int]],
    place: Path,
    divergence: Divergence | None,
    task: str,
    progress: OnProgress,
    blocks: BlockErrors | None = None,
) -> None:
    """Run a model over sequences of token ids, to keep its answers in ``place``, or to compare them with those kept.

    ``blocks`` is shown what every block returns. Raises MalformedInput for answers that are NaN, or have another shape
    than the kept.
    """
    visited: list[str] = []

    def tell(part: str) -> None:
        visited.append(part)
        progress(Progress(task, len(visited), len(steps.parts), unit="block"))

    def used(number: int, answer: Any) -> None:
        values = answered(model, answer, weights.checkpoint.folder.location)
        if divergence is None:
            keep(place, number, values)
        else:
            add(divergence, model, place, number, values, rows[number])

    steps = BlockPass(model.model, weights, tell, model.head, blocks.entering if blocks is not None else None)
    hooks = blocks.watch(model.model, compare=divergence is not None) if blocks is not None else []
    try:
        with running(type(model.model).__name__, weights.checkpoint.folder.location):
            weights.load_rest(steps.parts)
            steps.run((arguments(model, row) for row in rows), used)
    finally:
        for hook in hooks:
            hook.remove()


def answered(model: Runnable, answer: Any, where: str) -> NDArray[np.float32]:
    """Of one sequence the logits, or the last hidden states: float32[tokens, …]. Raises MalformedInput for NaN."""
    if model.head is not None:
        states = answer.logits
    else:
        states = getattr(answer, "last_hidden_state", None)
        states = states if states is not None else (getattr(answer, "hidden_states", None) or [None])[-1]
    if states is None:
        raise Unsupported(
            f"{where}: {type(model.model).__name__} returns neither token predictions nor hidden states, from "
            "which the loss is measured. Calibrate it without --scores."
        )
    values: NDArray[np.float32] = states[0].float().cpu().numpy()
    if np.isnan(values).any():
        raise MalformedInput(
            f"{where} returns NaN for a text: check its weights, and whether its dtype has the range for them."
        )
    return values


def arguments(model: Runnable, row: list[int]) -> dict[str, Any]:
    """Of the forward, for one sequence. A classifier around an encoder is asked for the encoder's states, too."""
    given: dict[str, Any] = model.arguments(torch.tensor([row]))
    inner = getattr(model.model, "base_model", model.model)
    return given if model.head is not None or inner is model.model else {**given, "output_hidden_states": True}


def keep(place: Path, number: int, values: NDArray[np.float32]) -> None:
    """Keep the answer to the sequence of this number."""
    np.save(place / f"{number}.npy", values)


def add(
    divergence: Divergence, model: Runnable, place: Path, number: int, values: NDArray[np.float32], row: list[int]
) -> None:
    """Compare the answer to the sequence ``row`` with the one that was kept under ``number``."""
    kept = np.load(place / f"{number}.npy", mmap_mode="r")
    if kept.shape != values.shape:
        raise MalformedInput(
            f"The outputs have the shapes {kept.shape} and {values.shape}: these are two different models. Name the "
            "original that was quantized."
        )
    if model.head is None:
        divergence.cosine.append(_cosine_loss(kept, values))
    else:
        _add(divergence, kept, values, row[1:] if _predicts_next(model) else None)


def _predicts_next(model: Runnable) -> bool:
    return bool(model.model.can_generate()) and not model.model.config.is_encoder_decoder


def _add(found: Divergence, kept: Any, values: Any, follows: list[int] | None) -> None:
    """Add the logits float32[tokens, vocabulary] of one sequence, by the original and by the other."""
    divergence, same, surprise = 0.0, 0, [0.0, 0.0]
    for start in range(0, len(values), ROWS):
        logits = (torch.from_numpy(np.array(each[start : start + ROWS])).double() for each in (kept, values))
        both = [each.log_softmax(-1) for each in logits]
        chance = both[0].exp()
        divergence += float(torch.where(chance == 0, 0, chance * (both[0] - both[1])).sum())
        same += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
        for which, each in enumerate(both):
            for row, token in enumerate((follows or [])[start : start + ROWS]):
                surprise[which] -= float(each[row, token])
    found.kl.append(divergence / len(values))
    found.same.append(same / len(values))
    if follows:
        for which, total in enumerate(surprise):
            found.surprise[which].append(total / len(follows))


def _cosine_loss(kept: Any, values: Any) -> float:
    one, two = (torch.from_numpy(np.array(each)).double().mean(0) for each in (kept, values))
    return float(1 - torch.nn.functional.cosine_similarity(one, two, dim=0))
