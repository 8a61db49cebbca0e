"""What ``qz calibrate`` and ``qz compare`` print."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from qz.json_reports.shared import Loss


class LinearScore(TypedDict):
    name: str
    score: float


class Scores(TypedDict):
    method: str
    loss: Literal["kl", "cosine", "output"]
    total: float
    tokens: int
    linears: list[LinearScore]


class CalibrateReport(TypedDict):
    """``qz calibrate``."""

    source: str
    output: str
    architecture: str
    text: str
    tokens: int
    sequences: int
    steps: int | None
    resolution: int | None
    seed: int | None
    components: list[str]
    weights_at_once: int | None
    linears: int
    unseen: list[str]
    hessian_files: list[str]
    hessian_bytes: int
    scores: Scores | None
    component_scores: dict[str, Scores]
    device: str
    dtype: str
    resumed: bool
    bytes_read: int
    seconds: float
    warnings: list[str]


class BlockError(TypedDict):
    name: str
    error: float | None


class OutputError(TypedDict):
    relative_error: float | None
    noise: float | None
    cosine_loss: float | None


class TimestepError(OutputError):
    component: str
    timestep: float


class CompareReport(TypedDict):
    """``qz compare``."""

    original: str
    other: str
    architecture: str
    text: str
    tokens: int
    sequences: int
    device: str
    dtype: str
    kl: float | None
    kl_error: float | None
    same_top: float | None
    perplexity_original: float | None
    perplexity_other: float | None
    cosine_loss: float | None
    blocks: list[BlockError]
    steps: int | None
    resolution: int | None
    seed: int | None
    denoiser: OutputError | None
    timesteps: list[TimestepError]
    latents: OutputError | None
    loss: Loss
    seconds: float
    warnings: list[str]
