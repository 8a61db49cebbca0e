"""From statistics of a model's inputs to what an error in each column of each weight counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qz.formats.malformed import Malformed, quoted
from qz.quantize.calibration.statistics import Floats, InputSums, Statistics, read_statistics

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Step

FLOOR = 1e-3
"""Of the mean over a layer's inputs, added to each: an input that calibration never saw still counts a little."""


@dataclass(frozen=True, slots=True)
class Matched:
    """Statistics by the names of a plan's weights."""

    sums: Mapping[str, InputSums]
    names: Mapping[str, str]
    """Weight → its name in the statistics."""
    missing: tuple[str, ...]
    """Weights that the file does not speak of."""
    unseen: tuple[str, ...]
    """Weights whose inputs were never seen, such as experts that no token was routed to."""


def column_weights(sums: InputSums) -> Floats | None:
    """E[x²] of each input plus ``FLOOR`` of the mean, scaled to a mean of 1; None where no token was seen."""
    total = sums.sum2.astype(np.float64)
    mean = total.mean()
    if sums.tokens == 0 or not mean > 0:
        return None
    weights: Floats = ((total + FLOOR * mean) / (mean * (1 + FLOOR))).astype(np.float32)
    return weights


def match(statistics: Statistics, steps: Iterable[Step], component: str = "", *, pipeline: bool = False) -> Matched:
    """Find each weight's statistics by its name in the model, in the output, or in the source.

    A weight merged from several source tensors, or split from one, has the inputs of each of these. ``component``: the
    folder of a pipeline that the weights belong to, with which names may begin; in a whole ``pipeline`` they must.
    Raises Malformed for sums of another length than the weight has inputs, or where nothing fits at all.
    """
    found: dict[str, InputSums] = {}
    names: dict[str, str] = {}
    missing: list[str] = []
    count = 0
    for step in steps:
        weight = step.weight
        count += 1
        plain = dict.fromkeys((weight.name, step.name, *weight.sources))
        prefixed = [f"{component}/{name}" for name in plain] if component else []
        name = next((each for each in (*prefixed, *(() if pipeline else plain)) if each in statistics.sums), None)
        if name is None:
            missing.append(weight.name)
            continue
        sums = statistics.sums[name]
        if sums.sum2.size != weight.shape[1]:
            raise Malformed(
                "statistics-malformed",
                f"{statistics.location} describes {sums.sum2.size} inputs of {quoted(name)}, and the weight has "
                f"{weight.shape[1]}. Calibrate the model that is quantized.",
            )
        found[weight.name], names[weight.name] = sums, name
    if count and not found:
        example = quoted(next(iter(statistics.sums)))
        wanted = quoted(f"{component}/{missing[0]}" if pipeline else missing[0])
        raise Malformed(
            "statistics-malformed",
            f"{statistics.location} speaks of none of the weights that are quantized: it has {example}, but no "
            f"{wanted}. Calibrate the model that is quantized.",
        )
    unseen = tuple(name for name, sums in found.items() if column_weights(sums) is None)
    return Matched(found, names, tuple(missing), unseen)


def read_importance(path: Path) -> Statistics:
    """The statistics in a file of either kind. Raises MissingInput and Malformed."""
    return read_statistics(path)


def described(statistics: Statistics, matched: Matched) -> dict[str, Any]:
    """What the report says of the file."""
    return {
        "file": Path(statistics.location).name,
        "sha256": statistics.sha256,
        "tokens": statistics.tokens,
        "weights": len(matched.sums),
        "missing": list(matched.missing),
        "unseen": list(matched.unseen),
    }


def warnings(statistics: Statistics, matched: Matched) -> tuple[str, ...]:
    """What the user should know about weights that the importance does not cover."""
    found = []
    name = Path(statistics.location).name
    for weights, why in ((matched.missing, "does not speak of"), (matched.unseen, "saw no token of")):
        if weights:
            shown = ", ".join(weights[:3]) + (" …" if len(weights) > 3 else "")
            noun = "1 quantized weight" if len(weights) == 1 else f"{len(weights)} quantized weights"
            found.append(f"{name} {why} {noun}, searched as if all inputs mattered the same: {shown}")
    return tuple(found)
