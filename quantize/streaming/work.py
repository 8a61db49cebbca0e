"""Steps under way, cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qz import MalformedInput
from qz.formats.malformed import quoted
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES
from qz.quantize.streaming.deferred import Deferred
from qz.quantize.streaming.measuring.not_finite import adapters_of, count_without_adapters

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder
    from qz.quantize.decoding.open import Reader
    from qz.quantize.planning.plan import Plan, Step


@dataclass(slots=True)
class Work:
    """A step under way."""

    step: Step
    chunks: int
    reader: Reader | None = None
    """Of the one source; None where there are several, or the whole is read at once."""
    nonfinite: int = 0
    first: int = -1
    absmax: NDArray[np.float32] | None = None
    """All of the weight's scales, kept where they are quantized too, or where codes are chosen for them afterwards."""
    deferred: list[Deferred] = field(default_factory=list)
    """Values that get their codes when the scales are known as a loader will see them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Values ``[start, stop)`` of a work's one source tensor, or the whole of a work that cannot be cut."""

    work: Work
    start: int
    stop: int
    whole: bool = False


def nonfinite_weight(work: Work, plan: Plan, folder: Folder) -> MalformedInput:
    """The error for a weight that cannot be quantized. It is read once more where LoRAs may have made it so."""
    weight = work.step.weight
    position = [int(i) for i in np.unravel_index(work.first, weight.shape)]
    beyond = " (or beyond float16's range)" if plan.method is not None and plan.method.bits == 8 else ""
    values = "value" if work.nonfinite == 1 else "values"
    name = f"{plan.checkpoint.folder.location}: {weight.sources[0]}"
    what = f"{work.nonfinite} NaN or infinite {values}{beyond}, first at {position}"
    adapters = adapters_of(work.step)
    limit = "F16" if beyond else SAFETENSORS_NAMES[weight.dtype]
    if adapters and not count_without_adapters(folder, work.step, limit):
        fused = " and ".join(f"{quoted(adapter.where, 200)} with scale {adapter.scale:g}" for adapter in adapters)
        return MalformedInput(
            f"{name} has {what}, once the LoRA {fused} is fused into it; without, all its values are finite. "
            "Check the LoRA, or choose a smaller scale (--lora LORA:SCALE)."
        )
    return MalformedInput(
        f"{name} contains {what}, "
        "which would corrupt its quantization block. Repair the weights, or use --keep-nonfinite to leave such tensors "
        "unquantized."
    )
