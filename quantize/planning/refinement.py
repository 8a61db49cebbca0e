"""How 4-bit weights are quantized better than by absmax, and what is known of their inputs; part of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qz.quantize.settings import Rounding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
    """Weights that are rounded by GPTQ → the name of their Hessian for ``read_hessian``."""
    read_hessian: Callable[[str], NDArray[np.float32] | None] | None = None

    def as_json(self) -> dict[str, Any]:
        return {"scales": "search", "rounding": self.rounding, "importance": self.importance}

    def hessian(self, weight: str) -> NDArray[np.float32]:
        """float32 (in, in) of a weight among ``hessians``, read anew."""
        found = self.read_hessian(self.hessians[weight]) if self.read_hessian is not None else None
        assert found is not None  # planning listed only weights whose Hessian is there
        return found


AS_THE_LIBRARIES: Mapping[str, Any] = {"scales": "absmax", "rounding": "nearest", "importance": None}
"""The same keys where nothing is refined."""
