"""How 4-bit weights are quantized better than by absmax, and what is known of their inputs; part of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qz.quantize.methods import FourBit
from qz.quantize.settings import Rounding, Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qz.quantize.calibration.statistics import Statistics
    from qz.quantize.planning.plan import Plan


@dataclass(frozen=True)
class Refinement:
    """Searched scales, and what the search knows. Weights by their name in the model."""

    rounding: Rounding = "nearest"
    weights: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """What an error counts in each column, ``scale_search.tiled_weights``; where there is none, all count the same."""
    importance: Mapping[str, Any] | None = None
    """What the report says of the file of importance."""
    notes: tuple[str, ...] = ()
    """What the user should not overlook."""
    hessians: Mapping[str, str] = field(default_factory=dict)
    """Weights that are rounded by GPTQ → the name of their Hessian in ``statistics``."""
    statistics: Statistics | None = None

    def as_json(self) -> dict[str, Any]:
        return {"scales": "search", "rounding": self.rounding, "importance": self.importance}

    def hessian(self, weight: str) -> NDArray[np.float32]:
        """float32 (in, in) of a weight among ``hessians``, read anew."""
        found = self.statistics.hessian(self.hessians[weight]) if self.statistics is not None else None
        assert found is not None  # planning took those that are there
        return found


AS_THE_LIBRARIES: Mapping[str, Any] = {"scales": "absmax", "rounding": "nearest", "importance": None}
"""The same keys where nothing is refined."""


def refinement(plan: Plan, settings: Settings, component: str = "", *, pipeline: bool = False) -> Refinement | None:
    """What ``settings`` say of the weights that ``plan`` quantizes; None where nothing is refined.

    ``component``, ``pipeline``: see ``qz.quantize.calibration.importance.match``. Raises MissingInput and
    MalformedInput for a file of importance that cannot be used.
    """
    if settings.scales == "absmax" or not isinstance(plan.method, FourBit):
        return None
    if settings.importance is None:
        return Refinement()
    from qz.quantize.calibration import importance
    from qz.quantize.compute.scale_search import tiled_weights

    quantized = [step for step in plan.steps if step.act == "quantize"]
    statistics = importance.read_importance(settings.importance, quantized, pipeline=pipeline)
    matched = importance.match(statistics, quantized, component, pipeline=pipeline)
    columns = {name: importance.column_weights(sums) for name, sums in matched.sums.items()}
    hessians, notes = {}, importance.warnings(statistics, matched)
    if settings.rounding == "gptq":
        hessians = importance.hessians(statistics, matched)
        notes = (*notes, *importance.gptq_warnings(statistics, matched, hessians))
    return Refinement(
        settings.rounding,
        {name: tiled_weights(weights) for name, weights in columns.items() if weights is not None},
        importance.described(statistics, matched),
        notes,
        hessians,
        statistics,
    )
