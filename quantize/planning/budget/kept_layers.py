"""Keep the most sensitive linears unquantized, until a model has the size it may have, or loses no more than it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qz import UsageError
from qz.counted import counted
from qz.formats.tensors.safetensors import BITS
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, Architecture, Weight
from qz.quantize.methods import Int8
from qz.quantize.planning.budget.sensitivity import Candidate, Scores, ranked, without_data
from qz.quantize.settings import Settings

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Plan

KEPT = "kept for its sensitivity"


@dataclass(frozen=True, slots=True)
class Point:
    """So many linears kept: the model's footprint in bytes, and what it is expected to lose."""

    kept: int
    size: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Which linears stay unquantized for ``--target-size`` or ``--max-loss``, and what else could have been chosen."""

    target_size: int | None
    max_loss: float | None
    split_groups: bool
    scores: Mapping[str, Any] | None
    """The file that the order comes from; None where it comes from a rule without data."""
    kept: tuple[str, ...]
    loss: float | None
    """What is expected to be lost, by absmax scales; None where no scores say so."""
    curve: tuple[Point, ...]
    """From nothing kept to everything, one group after the other."""
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "target_size": self.target_size,
            "max_loss": self.max_loss,
            "split_groups": self.split_groups,
            "scores": self.scores,
            "kept": list(self.kept),
            "expected_loss": self.loss,
            "curve": [{"kept": each.kept, "size": each.size, "expected_loss": each.loss} for each in self.curve],
        }


Planned = Callable[[tuple[str, ...]], "Plan"]
"""Plans again, with more modules to skip."""


@dataclass(frozen=True, slots=True)
class ScoreFile:
    """Scores, and what the report says of the file that they are from."""

    scores: Scores
    told: Mapping[str, Any]


def with_kept_layers(plan: Plan, settings: Settings, planned: Planned, scores: ScoreFile | None) -> Plan:
    """The plan that keeps what ``settings`` leave room for, or ask for. Raises UsageError for what is impossible."""
    ranking = _Ranking(plan, settings, scores)
    chosen = ranking.choose()
    while chosen:
        paths = tuple(path for each in chosen for path in each.paths)
        again = planned(paths)
        size = again.architecture.footprint.after
        if settings.target_size is None or size <= settings.target_size:
            return replace(again, architecture=_told(again.architecture, paths), kept_layers=ranking.report(chosen))
        chosen = chosen[:-1]  # the library's skip list matched more than these
    return replace(plan, kept_layers=ranking.report(()))


def curve_of(plan: Plan, settings: Settings, scores: ScoreFile) -> Sequence[Point]:
    """From nothing kept to everything, of a plan that keeps nothing for its sensitivity."""
    return _Ranking(plan, settings, scores).curve


def readable(nbytes: int) -> str:
    """A size, rounded up, as people and ``--target-size`` read it."""
    unit, power = next(((unit, power) for unit, power in (("GB", 9), ("MB", 6)) if nbytes >= 10**power), ("kB", 3))
    return f"{math.ceil(nbytes / 10 ** (power - 2)) / 100:.2f} {unit} ({nbytes:,} bytes)"


class _Ranking:
    def __init__(self, plan: Plan, settings: Settings, file: ScoreFile | None) -> None:
        assert plan.method is not None  # a plan that quantizes has a method
        self.plan, self.settings, self.method = plan, settings, plan.method
        weights = [step.weight for step in plan.steps if step.act == "quantize"]
        self.scores = file.scores if file is not None else None
        self.told = file.told if file is not None else None
        self.notes: list[str] = []
        if file is None and settings.scores is not None:  # the file has scores of other components only
            self.notes.append(
                f"{settings.scores} has no scores of this component: its linears are chosen by their names and places"
            )
        by_name = without_data(weights) if self.scores is None else self._known(weights, self.scores)
        self.candidates = ranked([(each, self._more(each)) for each in weights], by_name, split=settings.split_groups)
        self.base = plan.architecture.footprint.after
        self.unpredictable = self.scores is None or self.scores.method != self.method.name
        self.all = sum(each.score for each in self.candidates)
        self.curve = tuple(self._points())

    def choose(self) -> Sequence[Candidate]:
        target, most = self.settings.target_size, self.settings.max_loss
        where = self.plan.checkpoint.folder.location
        if target is not None:
            self._require_possible(target, where)
        chosen = self._losing_at_most(most, where) if most is not None else self._filling(target or 0)
        size = self.base + sum(each.nbytes for each in chosen)
        if target is not None and size > target:
            raise UsageError(
                f"--max-loss {most} with --target-size {readable(target)}: {where} takes {readable(size)} to lose no "
                "more. Allow one of them more."
            )
        return chosen

    def report(self, chosen: Sequence[Candidate]) -> KeptLayers:
        settings = self.settings
        return KeptLayers(
            settings.target_size,
            settings.max_loss,
            settings.split_groups,
            self.told,
            tuple(path for each in chosen for path in each.paths),
            self._loss(sum(each.score for each in chosen)),
            self.curve,
            tuple(self.notes),
        )

    def _require_possible(self, target: int, where: str) -> None:
        if target < self.base:
            smaller = " With --nf4 it would be smaller." if isinstance(self.method, Int8) else ""
            raise UsageError(
                f"--target-size {readable(target)} is not possible: {where} takes at least {readable(self.base)} in "
                f"memory as {self.method.name}.{smaller}"
            )
        whole = self.base + sum(each.nbytes for each in self.candidates)
        if target >= whole:
            raise UsageError(
                f"--target-size {readable(target)}: {where} fits as it is, with {readable(whole)} in memory. Use it "
                "unquantized."
            )

    def _filling(self, target: int) -> list[Candidate]:
        chosen, left = [], target - self.base
        for each in self.candidates:
            if each.nbytes <= left and each.score > 0:
                chosen.append(each)
                left -= each.nbytes
        return chosen

    def _losing_at_most(self, most: float, where: str) -> list[Candidate]:
        if self.scores is None:
            raise UsageError(
                "--max-loss needs to know what each linear loses: make a file of scores with `qz calibrate --scores`, "
                "and name it with --scores."
            )
        if self.unpredictable:
            raise UsageError(
                f"--max-loss: {self.told['file'] if self.told else 'the file'} tells what {self.scores.method} loses, "
                f"and not {self.method.name}. Make it with `qz calibrate --scores --method {self.method.name}`."
            )
        for count, point in enumerate(self.curve):
            if point.loss is not None and point.loss <= most and count < len(self.candidates):
                return self.candidates[:count]
        raise UsageError(
            f"--max-loss {most}: all that {where} has would have to stay as it is. Use it unquantized, or allow more."
        )

    def _points(self) -> Iterator[Point]:
        kept, size, score = 0, self.base, 0.0
        yield Point(0, size, self._loss(0.0))
        for each in self.candidates:
            kept, size, score = kept + len(each.paths), size + each.nbytes, score + each.score
            yield Point(kept, size, self._loss(score))

    def _loss(self, kept: float) -> float | None:
        """The loss of all, in the share of the scores that is not kept."""
        if self.unpredictable or self.scores is None:
            return None
        return self.scores.total * max(0.0, 1 - kept / self.all) if self.all else 0.0

    def _known(self, weights: Sequence[Weight], scores: Scores) -> dict[str, float]:
        found = {each.name: scores.of[each.name] for each in weights if each.name in scores.of}
        file = self.told["file"] if self.told else ""
        if weights and not found:
            raise UsageError(
                f"{file} scores none of the weights that are quantized. Score this model, with `qz calibrate --scores`."
            )
        if missing := [each.name for each in weights if each.name not in found]:
            shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
            self.notes.append(
                f"{file} has no score of {counted(len(missing), 'quantized weight')}, quantized all the same: {shown}"
            )
        if scores.method != self.method.name:
            self.notes.append(f"{file} scores {scores.method}: its order is used, what is lost is not predicted")
        return found

    def _more(self, weight: Weight) -> int:
        nbytes = weight.count * BITS[SAFETENSORS_NAMES[weight.dtype]] // 8
        return nbytes - self.method.footprint(weight.count)


def _told(architecture: Architecture, paths: Sequence[str]) -> Architecture:
    """With the reason why these are kept."""
    chosen = set(paths)
    kept = {path: KEPT if path in chosen else why for path, why in architecture.kept_linears.items()}
    return replace(architecture, kept_linears=kept)
