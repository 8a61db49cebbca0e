"""What quantization lost: the error of every layer and of all together, summed up chunk by chunk.

For values x and dequantized values q: relative error is the Frobenius norm of q - x by that of x, the signal-to-noise
ratio is its square's inverse in decibels (20 log10(|x| / |q - x|)), and the largest error is max |q - x|.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from qz.quantize.compute import kernels

RECORDED = 5_000
"""Layers in a record at most, the worst, so that it stays a small file."""
UNRELATED = 0.9
"""Relative error from which on two models have nothing in common: that of unrelated weights is about 1.4."""


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """The loss of one layer, or of all. What cannot be expressed (no values, NaN, no error at all) is inf or NaN."""

    name: str
    parameters: int
    squared_error: float
    squared_norm: float
    max_error: float

    @property
    def relative_error(self) -> float:
        if self.squared_error == 0:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else math.inf

    @property
    def snr_db(self) -> float:
        """Decibels: 20.7 for a relative error of 0.092. Infinite without any error."""
        error = self.relative_error
        return -20 * math.log10(error) if error else math.inf

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "relative_error": _finite(self.relative_error),
            "snr_db": _finite(self.snr_db),
            "max_error": _finite(self.max_error),
        }


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of all quantized weights together, and of each layer, worst first."""

    total: LayerLoss
    layers: tuple[LayerLoss, ...]

    @property
    def unrelated(self) -> bool:
        """Whether the compared models have nothing to do with each other."""
        return not self.total.relative_error < UNRELATED

    def as_json(self) -> dict[str, Any]:
        total = self.total.as_json()
        del total["name"]
        return {"total": total, "layers": [layer.as_json() for layer in self.layers]}

    def recorded(self) -> dict[str, Any]:
        """The JSON value for a record: in six digits, as the last ones of sums differ with the order of threads."""
        told = replace(self, layers=self.layers[:RECORDED]).as_json()
        left_out = len(self.layers) - len(told["layers"])
        return {
            "total": _rounded(told["total"]),
            "layers": list(map(_rounded, told["layers"])),
            **({"layers_left_out": left_out} if left_out else {}),
        }


class Tally:
    """Collects the errors of a run's chunks, from any thread."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[int, float, float, float]] = {}
        self.lock = threading.Lock()

    def add(self, name: str, original: NDArray[Any], original_dtype: str, values: NDArray[Any], dtype: str) -> None:
        """Add a chunk of the weight ``name``: its ``original`` values, and the dequantized ``values`` of ``dtype``.

        Both 1-D, as kernels see them: float32, or the bits of float16 and bfloat16.
        """
        squares, total, largest = kernels.error_sums(original, original_dtype, values, dtype)
        with self.lock:
            before = self.sums.get(name, (0, 0.0, 0.0, 0.0))
            top = largest if math.isnan(largest) else max(before[3], largest)
            self.sums[name] = (before[0] + values.size, before[1] + squares, before[2] + total, top)

    def loss(self) -> Loss:
        """What was collected so far."""
        with self.lock:
            layers = [LayerLoss(_module(name), *sums) for name, sums in self.sums.items()]
        return _together(layers)


def joined(losses: Mapping[str, Loss]) -> Loss:
    """The loss of several models as one, their layers under COMPONENT.LAYER."""
    return _together(
        [replace(layer, name=f"{name}.{layer.name}") for name, loss in losses.items() for layer in loss.layers]
    )


def _together(layers: Sequence[LayerLoss]) -> Loss:
    total = LayerLoss(
        "total",
        sum(layer.parameters for layer in layers),
        math.fsum(layer.squared_error for layer in layers),
        math.fsum(layer.squared_norm for layer in layers),
        max((layer.max_error for layer in layers), default=0.0),
    )
    return Loss(total, tuple(sorted(layers, key=_by_error)))


def _by_error(layer: LayerLoss) -> tuple[bool, float, str]:
    """Worst first: what is not a number before all else, then by relative error."""
    error = layer.relative_error
    return not math.isnan(error), -error if not math.isnan(error) else 0.0, layer.name


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _rounded(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in told.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
