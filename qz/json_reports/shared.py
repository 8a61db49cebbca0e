"""What the reports of several commands have in common."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict


class Origin(TypedDict):
    location: str
    revision: str | None
    subfolder: str | None
    library: str | None
    architecture: str | None


class Parameters(TypedDict):
    total: int
    quantized: int


class TotalLoss(TypedDict):
    parameters: int
    relative_error: float | None
    snr_db: float | None
    max_error: float | None


class LayerLoss(TotalLoss):
    name: str


class Loss(TypedDict):
    total: TotalLoss
    layers: list[LayerLoss]
    layers_left_out: NotRequired[int]


class Problem(TypedDict):
    severity: Literal["error", "warning"]
    kind: str
    where: str
    message: str
