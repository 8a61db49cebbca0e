"""``qz compare``: what quantizing changed in a model's weights, and in what it makes of a text.

Both models run block by block, one after the other. The original's answers wait in a temporary file for the other's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import Unsupported, UsageError
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.folder import Folder
from qz.progress import OnProgress, Progress
from qz.quantize.calibration.answers import Divergence, answer
from qz.quantize.calibration.block_errors import BlockErrors
from qz.quantize.calibration.running import text as texts
from qz.quantize.calibration.running.weights import Weights
from qz.quantize.compute.run_device import run_device
from qz.quantize.libraries.architecture import LoadRequest
from qz.quantize.libraries.examine import examine
from qz.quantize.libraries.plain import plain_checkpoint
from qz.quantize.libraries.transformers.runnable import runnable
from qz.quantize.planning.dequantization import as_plain, plan_dequantization, quantized_weights
from qz.quantize.planning.unquantized import equal_tensors, refuse_quantized
from qz.quantize.settings import Settings
from qz.quantize.streaming.measuring.measure import AgainstOriginal

if TYPE_CHECKING:
    from qz.quantize.streaming.measuring.loss import Loss


@dataclass(frozen=True, slots=True)
class OutputError:
    """Of outputs y and their changes Δ, the mean over prompts of |Δ|² / |y|², its standard error, and 1 − cosine."""

    relative_error: float
    noise: float | None
    cosine_loss: float


@dataclass(frozen=True, slots=True)
class TimestepError:
    """Of a denoiser's output at one timestep, or at the step of that number if it takes no timesteps."""

    component: str
    timestep: float
    error: OutputError


TOKENS = 2048
MOST_TOKENS = 16_384
"""Each sequence is a forward of its own that waits in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What quantizing changed. Figures of a kind that the model does not have are None.

    ``kl``: mean KL divergence of the predicted tokens, in nats per token, from the original's; ``kl_error`` its
    standard error over sequences. ``same_top``: the share of tokens after which the most likely next one is the same.
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
    kl: float | None = None
    kl_error: float | None = None
    same_top: float | None = None
    perplexity_original: float | None = None
    perplexity_other: float | None = None
    cosine_loss: float | None = None
    loss: Loss
    seconds: float
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Block → the mean over tokens of |Δ|² / |y|²: y what it returns in the original, Δ what has changed of it."""
    steps: int | None = None
    """Of pipelines, which draw ``sequences`` prompts."""
    resolution: int | None = None
    seed: int | None = None
    denoiser: OutputError | None = None
    """Of the outputs of a pipeline's denoisers at the original's steps."""
    timesteps: tuple[TimestepError, ...] = ()
    latents: OutputError | None = None
    """Of the last latents, to which either pipeline went its own way."""

    def as_json(self) -> dict[str, Any]:
        others = ("loss", "dry_run", "blocks", "denoiser", "timesteps", "latents")
        told = {name: getattr(self, name) for name in self.__slots__ if name not in others}
        told["blocks"] = [{"name": name, "error": error} for name, error in self.blocks.items()]
        for name, error in (("denoiser", self.denoiser), ("latents", self.latents)):
            told[name] = None if error is None else asdict(error)
        told["timesteps"] = [
            {"component": each.component, "timestep": each.timestep, **asdict(each.error)} for each in self.timesteps
        ]
        return told | {"loss": self.loss.as_json()}


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
    _require_reading_text(original, other)
    words = texts.text_of(text)
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
    apart = Divergence()
    with tempfile.TemporaryDirectory(prefix="qz-") as name:
        place = Path(name)
        blocks = BlockErrors(place)
        answer(first, Weights(original, first), rows, place, None, "Running the original", progress, blocks)
        answer(second, Weights(other, second, sources), rows, place, apart, "Running the other", progress, blocks)
    progress(Progress("Comparing weights"))
    loss = measure.alone(plan, Settings(None, device=device))
    tokenizer_folder.check()  # the weights' folders were checked when the loss was measured
    count = sum(map(len, rows))
    few = (f"the text has {count:,} tokens for this model, fewer than the {wanted:,} asked for",)
    perplexity_original, perplexity_other = apart.perplexities
    return Comparison(
        original=names[0],
        other=names[1],
        architecture=found.class_name,
        text="default" if text is None else text.name,
        tokens=count,
        sequences=len(rows),
        device=str(where),
        dtype=str(dtype).removeprefix("torch."),
        kl=_mean(apart.kl),
        kl_error=apart.kl_error,
        same_top=_mean(apart.same),
        perplexity_original=perplexity_original,
        perplexity_other=perplexity_other,
        cosine_loss=_mean(apart.cosine),
        loss=loss,
        seconds=time.monotonic() - begun,
        warnings=few if count < wanted else (),
        blocks=blocks.means(),
    )


def _require_reading_text(*models: Checkpoint) -> None:
    for checkpoint in models:
        if checkpoint.library != "transformers":
            raise Unsupported(
                f"{checkpoint.folder.location} is a model of {checkpoint.library}, and only models of transformers "
                "read text. `qz dequantize --against` measures what its weights lost."
            )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
