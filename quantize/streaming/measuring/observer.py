"""What a run shows of its work to those who measure it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qz.quantize.compute.arrays import Memory
from qz.quantize.methods import FourBit, Method
from qz.quantize.planning.plan import Step

Values = tuple[NDArray[Any], str]
"""A 1-D array as kernels see it, float32 or the bits of 16-bit floats, and its dtype."""


class Observer(Protocol):
    """Sees every chunk of a run, from the run's threads. Arrays are valid during the call only."""

    def quantized(
        self,
        step: Step,
        method: Method,
        start: int,
        original: Values,
        codes: NDArray[Any],
        scales: NDArray[np.float32],
        memory: Memory,
    ) -> None:
        """The ``original`` values from ``start`` on are now ``codes`` (packed, or int8 rows) and ``scales``.

        Scales are absmax, before double quantization, or SCB.
        """
        ...

    def absmax_known(self, step: Step, method: FourBit, absmax: NDArray[np.float32]) -> None:
        """The whole weight's absmax as a loader will see it after double quantization."""
        ...

    def dequantized(self, step: Step, start: int, values: Values, memory: Memory) -> None:
        """The values from ``start`` on, dequantized and cast."""
        ...

    def give_up(self) -> None:
        """The run has failed: reads that the observer waits for end with an error."""
        ...
