"""What ``qz quantize``, ``qz dequantize`` and ``qz merge`` print."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from qz.json_reports.publishing import PushReport
from qz.json_reports.shared import Loss, Origin, Parameters


class ConvertedOrigin(Origin):
    module: NotRequired[str]
    pipeline: NotRequired[str]


class Tensors(TypedDict):
    quantized: int
    kept: int


class ConvertedBytes(TypedDict):
    source: int
    output: int
    all_files: NotRequired[int]


class Footprint(TypedDict):
    before: int
    after: int


class Shard(TypedDict):
    name: str
    bytes: int
    sha256: str | None


class Lora(TypedDict):
    location: str
    revision: str | None
    file: str
    sha256: str
    config_sha256: str | None
    scale: float
    weights: int


class Importance(TypedDict):
    file: str
    sha256: str
    tokens: int
    weights: int
    missing: list[str]
    unseen: list[str]


class NonFinite(TypedDict):
    name: str
    stored: int
    overflowed: int


class ScoreFile(TypedDict):
    file: str
    sha256: str
    method: str
    loss: Literal["kl", "cosine", "output"]
    total: float
    tokens: int


class Point(TypedDict):
    kept: int
    size: int
    expected_loss: float | None


class KeptLayers(TypedDict):
    target_size: int | None
    max_loss: float | None
    split_groups: bool
    scores: ScoreFile | None
    kept: list[str]
    expected_loss: float | None
    curve: list[Point]


class Part(TypedDict):
    number: int
    of: int


class Combination(TypedDict):
    methods: dict[str, str]
    size: int
    expected_weight_error: float


class Component(TypedDict):
    name: str
    library: str
    architecture: str | None
    converted: bool
    reason: str
    method: str
    double_quant: bool
    scales: NotRequired[str]
    rounding: NotRequired[str]
    importance: NotRequired[Importance | None]
    dtype: str | None
    loss: NotRequired[Loss | None]
    parameters: Parameters
    skipped: list[str]
    kept_layers: NotRequired[KeptLayers]
    bytes: ConvertedBytes
    memory_footprint: Footprint


class Report(TypedDict):
    """What the reports of ``qz quantize`` and ``qz dequantize`` have in common."""

    act: Literal["quantize", "dequantize"]
    source: ConvertedOrigin
    output: str | None
    method: str
    double_quant: bool
    scales: NotRequired[str]
    rounding: NotRequired[str]
    importance: NotRequired[Importance | None]
    loras: NotRequired[list[Lora]]
    device: str
    bytes_of: NotRequired[str]
    dry_run: bool
    parameters: Parameters
    tensors: Tensors
    skipped: list[str]
    bytes: ConvertedBytes
    bits_per_weight: float
    memory_footprint: Footprint
    shards: list[Shard]
    carried: list[str]
    left_out: list[str]
    nonfinite: list[NonFinite]
    warnings: list[str]
    up_to_date: Literal[False]
    resumed: bool
    seconds: float
    part: NotRequired[Part]
    push: NotRequired[PushReport]


class ModelReport(Report):
    """``qz quantize`` and ``qz dequantize`` of a model."""

    dtype: str
    loss: Loss | None
    kept_layers: NotRequired[KeptLayers]


class PipelineReport(Report):
    """``qz quantize`` and ``qz dequantize`` of a pipeline."""

    loss: Loss | None
    components: list[Component]
    combinations: NotRequired[list[Combination]]
    lacking: NotRequired[list[str]]
    kept_layers: NotRequired[KeptLayers]


class Recorded(TypedDict):
    """What an earlier run recorded; a key that this version or that run does not know of is not there."""

    act: NotRequired[Literal["quantize", "dequantize"]]
    source: dict[str, str | None]
    output: str | None
    method: NotRequired[str]
    double_quant: NotRequired[bool]
    scales: NotRequired[str]
    rounding: NotRequired[str]
    importance: NotRequired[Importance | None]
    loras: NotRequired[list[Lora]]
    device: NotRequired[str]
    bytes_of: NotRequired[str]
    dtype: NotRequired[str]
    dry_run: Literal[False]
    parameters: NotRequired[Parameters]
    tensors: NotRequired[Tensors]
    skipped: NotRequired[list[str]]
    bytes: NotRequired[ConvertedBytes]
    bits_per_weight: NotRequired[float]
    memory_footprint: NotRequired[Footprint]
    shards: list[Shard]
    carried: NotRequired[list[str]]
    left_out: NotRequired[list[str]]
    loss: NotRequired[Loss | None]
    kept_layers: NotRequired[KeptLayers]
    components: NotRequired[list[Component]]
    combinations: NotRequired[list[Combination]]
    lacking: NotRequired[list[str]]
    origin: NotRequired[dict[str, Any]]
    nonfinite: list[NonFinite] | None
    warnings: list[str]
    resumed: Literal[False]
    seconds: float
    push: NotRequired[PushReport]


class UpToDateReport(Recorded):
    """``qz quantize`` and ``qz dequantize`` where there was nothing to do."""

    up_to_date: Literal[True]


class MergeReport(Recorded):
    """``qz merge``."""

    up_to_date: bool
    parts: int
