"""From statistics of a model's inputs to what an error in each column of each weight counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qz import UsageError
from qz.counted import counted
from qz.formats.malformed import Malformed, quoted
from qz.quantize.importance.statistics import Floats, InputSums, Statistics, read_statistics
from qz.quantize.planning.membership import ALONE, Membership

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Step

FLOOR = 1e-3
"""Of the mean over a layer's inputs, added to each: an input that calibration never saw still counts a little."""

GPTQ_TOKENS = 16_384
"""From here on the loss on other text hardly falls any more."""


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


def match(statistics: Statistics, steps: Iterable[Step], member: Membership = ALONE) -> Matched:
    """Find each weight's statistics by its name in the model, in the output, or in the source.

    A weight merged from several source tensors, or split from one, has the inputs of each of these. Names may begin
    with the component that the weights belong to; in a whole pipeline they must.
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
        prefixed = [f"{member.component}/{name}" for name in plain] if member.component else []
        possible = prefixed if member.whole_pipeline else (*prefixed, *plain)
        name = next((each for each in possible if each in statistics.sums), None)
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
        example = quoted(next(iter(statistics.sums), "nothing"))
        wanted = quoted(f"{member.component}/{missing[0]}" if member.whole_pipeline else missing[0])
        raise Malformed(
            "statistics-malformed",
            f"{statistics.location} covers none of the weights that are quantized: it has {example}, but no "
            f"{wanted}. Calibrate the model that is quantized.",
        )
    unseen = tuple(name for name, sums in found.items() if column_weights(sums) is None)
    return Matched(found, names, tuple(missing), unseen)


def read_importance(path: Path, steps: Iterable[Step], member: Membership = ALONE) -> Statistics:
    """The statistics in a file of either kind; an imatrix of llama.cpp's is put under the names of the weights.

    Raises MissingInput and Malformed, and UsageError for an imatrix and a whole pipeline.
    """
    from qz.quantize.importance.imatrix import is_imatrix, read_imatrix

    if not is_imatrix(path):
        return read_statistics(path)
    if member.whole_pipeline:
        raise UsageError(f"{path} is an imatrix, which describes one model: name its component with --subfolder.")
    return read_imatrix(path, steps)


def hessians(statistics: Statistics, matched: Matched) -> dict[str, str]:
    """Weight → the name of its Hessian. Raises Malformed where the file has none."""
    if not statistics.hessians:
        raise Malformed(
            "statistics-malformed",
            f"{statistics.location} contains no Hessians, which --rounding gptq needs. Make it again with `qz "
            "calibrate --hessians`, or leave out --rounding gptq.",
        )
    names = {weight: name for weight, name in matched.names.items() if weight not in matched.unseen}
    return {weight: name for weight, name in names.items() if name in statistics.hessians}


def gptq_warnings(statistics: Statistics, matched: Matched, found: Mapping[str, str]) -> tuple[str, ...]:
    """What the user should know of the Hessians that weights are rounded by."""
    file = Path(statistics.location).name
    told = []
    fewest = min((matched.sums[weight].tokens for weight in found), default=0)
    if fewest < GPTQ_TOKENS:
        told.append(
            f"{file} was made of {counted(fewest, 'token')} for some layers: with fewer than {GPTQ_TOKENS:,}, GPTQ "
            f"fits these tokens more than the model. Calibrate with more ({_more(statistics)})"
        )
    kind = "prompts" if _drew(statistics) else "text"
    told.append(f"GPTQ fits the kind of {kind} that {file} was made of, and may lose on others: calibrate with yours")
    rest = [weight for weight in matched.sums if weight not in found and weight not in matched.unseen]
    if rest:
        told.append(f"{file} has no Hessian of {_weights(rest)}, rounded to the nearest level: {_shown(rest)}")
    return tuple(told)


def _drew(statistics: Statistics) -> bool:
    return "prompts" in statistics.metadata


def _more(statistics: Statistics) -> str:
    """What makes a calibration see more."""
    return "prompts in --text, or --steps" if _drew(statistics) else "--tokens"


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
            count, shown = _weights(weights), _shown(weights)
            found.append(f"{name} {why} {count}, searched as if all inputs mattered the same: {shown}")
    if any(".experts." in weight and weight.endswith(".weight") for weight in matched.missing):
        found.append("experts are recorded by `qz calibrate --experts`")
    return tuple(found)


def _weights(names: Sequence[str]) -> str:
    return counted(len(names), "quantized weight")


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
