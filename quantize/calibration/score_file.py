"""The scores that a choice of layers goes by: those of a file that was named, or that the file of importance has."""

from __future__ import annotations

from qz import UsageError
from qz.quantize.calibration.imatrix import is_imatrix
from qz.quantize.calibration.statistics import read_statistics
from qz.quantize.planning.kept_layers import ScoreFile
from qz.quantize.settings import Settings


def score_file(settings: Settings) -> ScoreFile | None:
    """None where ``settings`` name none. Raises MissingInput, Malformed, and UsageError for a file without scores."""
    file = settings.scores or settings.importance
    if file is None or (settings.scores is None and is_imatrix(file)):
        return None
    statistics = read_statistics(file)
    found = statistics.scores
    if found is None:
        if settings.scores is None:
            return None
        raise UsageError(f"{file} has no scores. Make it again with `qz calibrate --scores`, or leave out --scores.")
    return ScoreFile(found, {"file": file.name, "sha256": statistics.sha256, **found.about()})
