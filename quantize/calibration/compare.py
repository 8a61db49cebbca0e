"""``qz compare``: what quantizing changed in a model's weights, and in what it makes of a text.

Both models run block by block, one after the other. The original's answers wait in a temporary file for the other's.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qz import MalformedInput, Unsupported, UsageError
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.folder import Folder
from qz.formats.sources.encoded import plain_checkpoint
from qz.progress import OnProgress, Progress
from qz.quantize.calibration import text as texts
from qz.quantize.calibration.blocks import BlockPass
from qz.quantize.calibration.weights import Weights
from qz.quantize.compute.run_device import run_device
from qz.quantize.libraries.architecture import LoadRequest
from qz.quantize.libraries.examine import examine
from qz.quantize.libraries.transformers.runnable import Runnable, runnable, running
from qz.quantize.planning.dequantization import as_plain, plan_dequantization, quantized_weights
from qz.quantize.planning.unquantized import equal_tensors, refuse_quantized
from qz.quantize.settings import Settings
from qz.quantize.streaming.measure import AgainstOriginal

if TYPE_CHECKING:
    from qz.quantize.streaming.loss import Loss

TOKENS = 2048
MOST_TOKENS = 16_384
"""Each sequence is a forward of its own that waits in memory."""
ROWS = 64
"""Tokens whose predictions are compared at a time, in float64."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What quantizing changed. Figures of a kind that the model does not have are None.

    ``kl``: mean KL divergence of the predicted tokens, in nats a token, from the original's; ``kl_error`` its standard
    error over sequences. ``same_top``: the share of tokens after which the most likely next one is the same.
    ``cosine_loss``: 1 − cosine of the mean last hidden state of a sequence, on average, for models without predictions.
    """

    original: str
    other: str
    architecture: str
    text: str
    tokens: int
    sequences: int
    device: str
    dtype: str
    kl: float | None
    kl_error: float | None
    same_top: float | None
    perplexity_original: float | None
    perplexity_other: float | None
    cosine_loss: float | None
    loss: Loss
    seconds: float
    warnings: tuple[str, ...] = ()
    dry_run: bool = False

    def as_json(self) -> dict[str, Any]:
        names = [name for name in self.__slots__ if name not in ("loss", "dry_run")]
        return {name: getattr(self, name) for name in names} | {"loss": self.loss.as_json()}


@dataclass(slots=True)
class _Sums:
    """Per sequence: the mean of what was found over its tokens."""

    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    surprise: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    """Of the next token, in nats: by the original, by the other."""
    cosine: list[float] = field(default_factory=list)


def compare(
    original: Checkpoint,
    other: Checkpoint,
    names: tuple[str, str],
    tokenizer_folder: Folder,
    text: Path | None,
    tokens: int | None,
    device: str,
    progress: OnProgress,
) -> Comparison:
    """Compare a model with what bitsandbytes made of it. Raises what reading and running raise."""
    begun = time.monotonic()
    wanted = TOKENS if tokens is None else tokens
    if not 1 <= wanted <= MOST_TOKENS:
        raise UsageError(f"--tokens {wanted} is not a number of tokens from 1 to {MOST_TOKENS:,}.")
    original = plain_checkpoint(original)
    refuse_quantized(original)
    for checkpoint in (original, other):
        if checkpoint.library != "transformers":
            raise Unsupported(
                f"{checkpoint.folder.location} is a model of {checkpoint.library}, and text is read by models of "
                "transformers. `qz dequantize --against` tells what its weights lost."
            )
    words = texts.default_text() if text is None else texts.read_text_file(text)
    if not words.strip():
        raise UsageError("The text is empty. Name one of a few pages with --text FILE.")
    tokenizer = texts.open_tokenizer(tokenizer_folder)
    plan = plan_dequantization(other, Settings(None))
    measure = AgainstOriginal(original)
    measure.check(plan)
    found = examine(original, LoadRequest(None), equal=lambda one, two: equal_tensors(original, one, two))
    where, dtype = run_device(device, found.dtype)
    sources, given = as_plain(other, quantized_weights(other))
    first = runnable(original, found.class_name, dtype, where)
    second = runnable(other, plan.architecture.class_name, dtype, where, given)
    rows = texts.sequences(tokenizer, words, first.longest, wanted)
    sums = _Sums()
    with tempfile.TemporaryDirectory(prefix="qz-") as place:
        for model, weights in ((first, Weights(original, first)), (second, Weights(other, second, sources))):
            _run(model, weights, rows, Path(place), sums if model is second else None, progress)
    progress(Progress("Comparing weights"))
    loss = measure.alone(plan, Settings(None, device=device))
    count = sum(map(len, rows))
    few = (f"the text has {count:,} tokens for this model, fewer than the {wanted:,} asked for",)
    return Comparison(
        *names,
        found.class_name,
        "default" if text is None else text.name,
        count,
        len(rows),
        str(where),
        str(dtype).removeprefix("torch."),
        _mean(sums.kl),
        float(np.std(sums.kl, ddof=1) / math.sqrt(len(sums.kl))) if len(sums.kl) > 1 else None,
        _mean(sums.same),
        _perplexity(sums.surprise[0]),
        _perplexity(sums.surprise[1]),
        _mean(sums.cosine),
        loss,
        time.monotonic() - begun,
        few if count < wanted else (),
    )


def _run(
    model: Runnable, weights: Weights, rows: list[list[int]], place: Path, sums: _Sums | None, progress: OnProgress
) -> None:
    """Run a model over the sequences, to keep its answers in ``place``, or to compare them with those kept."""
    name = "original" if sums is None else "other"
    visited: list[str] = []

    def tell(part: str) -> None:
        visited.append(part)
        progress(Progress(f"Running the {name}", len(visited), len(steps.parts), unit="block"))

    def used(number: int, answer: Any) -> None:
        predicts = model.head is not None
        values = (answer.logits if predicts else answer.last_hidden_state)[0].float().cpu().numpy()
        if np.isnan(values).any():
            where = weights.checkpoint.folder.location
            raise MalformedInput(
                f"{where} answers a text with NaN: its weights, or the numbers' range, do not allow it."
            )
        if sums is None:
            np.save(place / f"{number}.npy", values)
            return
        kept = np.load(place / f"{number}.npy", mmap_mode="r")
        if kept.shape != values.shape:
            raise MalformedInput(
                f"The models' answers have the shapes {kept.shape} and {values.shape}: these are two different models."
            )
        follows = rows[number][1:] if predicts and _predicts_next(model) else None
        _add(sums, kept, values, follows) if predicts else sums.cosine.append(_cosine_loss(kept, values))

    steps = BlockPass(model.model, weights, tell, model.head)
    with running(type(model.model).__name__, weights.checkpoint.folder.location):
        weights.load_rest(steps.parts)
        steps.run((model.arguments(torch.tensor([row])) for row in rows), used)


def _predicts_next(model: Runnable) -> bool:
    return bool(model.model.can_generate()) and not model.model.config.is_encoder_decoder


def _add(sums: _Sums, kept: Any, values: Any, follows: list[int] | None) -> None:
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
    sums.kl.append(divergence / len(values))
    sums.same.append(same / len(values))
    if follows:
        for which, total in enumerate(surprise):
            sums.surprise[which].append(total / len(follows))


def _cosine_loss(kept: Any, values: Any) -> float:
    one, two = (torch.from_numpy(np.array(each)).double().mean(0) for each in (kept, values))
    return float(1 - torch.nn.functional.cosine_similarity(one, two, dim=0))


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _perplexity(surprise: list[float]) -> float | None:
    return math.exp(sum(surprise) / len(surprise)) if surprise else None
