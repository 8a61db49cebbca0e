"""The scores that a choice of layers goes by: those of a file that was named, or that the file of importance has."""

from __future__ import annotations

from collections.abc import Iterable

from qz import UsageError
from qz.quantize.importance.imatrix import is_imatrix
from qz.quantize.importance.statistics import read_statistics
from qz.quantize.planning.budget.kept_layers import ScoreFile
from qz.quantize.planning.membership import ALONE, Membership
from qz.quantize.settings import Settings


def score_file(settings: Settings, member: Membership = ALONE) -> ScoreFile | None:
    """None where ``settings`` name none, or the file has none of this component of a whole pipeline.

    Raises MissingInput, Malformed, and UsageError for a file without scores.
    """
    file = settings.scores or settings.importance
    if file is None or (settings.scores is None and is_imatrix(file)):
        return None
    statistics = read_statistics(file)
    found = statistics.component_scores.get(member.component) or (None if member.whole_pipeline else statistics.scores)
    if found is None:
        if settings.scores is None or member.whole_pipeline:
            return None
        whose = f" of {member.component}" if statistics.component_scores and member.component else ""
        raise UsageError(
            f"{file} has no scores{whose}. Make it again with `qz calibrate --scores`, or leave out --scores."
        )
    return ScoreFile(found, {"file": file.name, "sha256": statistics.sha256, **found.about()})


def unscored(settings: Settings, components: Iterable[str]) -> list[str]:
    """Those of a pipeline's ``components`` that the file which is named, if there is one, has no scores of."""
    if settings.scores is None and settings.importance is None:
        return []
    return [name for name in components if score_file(settings, Membership(name, whole_pipeline=True)) is None]


def refuse_unscored(settings: Settings, components: Iterable[str]) -> None:
    """Raise UsageError where ``--scores`` name a file that scores none of a pipeline's ``components``."""
    if settings.scores is None:
        return
    statistics = read_statistics(settings.scores)
    scored, wanted = sorted(statistics.component_scores), list(components)
    if set(scored).isdisjoint(wanted):
        of_one = "scores of one model" if statistics.scores is not None else "no scores"
        has = f"scores of {', '.join(scored)}" if scored else of_one
        raise UsageError(
            f"{settings.scores} has {has}, and none of what is quantized of this pipeline ({', '.join(wanted)}). Make "
            "it with `qz calibrate PIPELINE --scores`, or name one component with --subfolder."
        )
