"""The methods of a pipeline's components that make it fit a size and lose as little of its weights as that allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from qz.quantize.methods import Method

ERRORS = {"nf4": 0.094, "fp4": 0.126, "int8": 0.0085}
"""Relative errors of trained weights (MiniLM-L6, SmolLM2-135M), by method; 0 for what stays as it is."""


@dataclass(frozen=True, slots=True)
class Option:
    """What may become of a component, and its footprint in bytes then."""

    component: str
    method: Method | None
    size: int
    quantized: int
    """Parameters."""

    @property
    def squared_error(self) -> float:
        """Of all its quantized weights, if they were of one size."""
        return self.quantized * ERRORS[self.method.name] ** 2 if self.method is not None else 0.0


@dataclass(frozen=True, slots=True)
class Combination:
    """A choice for every component, and what the whole pipeline takes in memory."""

    options: tuple[Option, ...]
    size: int
    error: float
    """Expected relative error of all weights together."""

    def as_json(self) -> dict[str, Any]:
        methods = {each.component: each.method.name if each.method is not None else "none" for each in self.options}
        return {"methods": methods, "size": self.size, "expected_weight_error": self.error}


def combinations(options: Iterable[Sequence[Option]], fixed: int, parameters: int) -> tuple[Combination, ...]:
    """Those that no smaller one equals in its error, from the smallest. ``options``: of each component that is free;
    ``fixed``: bytes of all others; ``parameters``: of the whole pipeline."""
    found = sorted(
        (
            Combination(
                each,
                fixed + sum(option.size for option in each),
                math.sqrt(sum(option.squared_error for option in each) / max(parameters, 1)),
            )
            for each in product(*options)
        ),
        key=lambda each: (each.size, each.error),
    )
    front: list[Combination] = []
    for each in found:
        if not front or each.error < front[-1].error:
            front.append(each)
    return tuple(front)


def largest_within(combinations: Sequence[Combination], target: int) -> Combination | None:
    """The one of the least error that takes no more than ``target`` bytes."""
    return max((each for each in combinations if each.size <= target), key=lambda each: each.size, default=None)
