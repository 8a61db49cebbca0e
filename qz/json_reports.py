"""The objects that ``--json`` prints, as types: docs/reference/json.md says in words what each key is.

Keys are only added in later versions. A key that is not required is there in the runs that have something to say of it.
Sizes are in bytes. Nothing here is imported by a command; ``make docs`` writes JSON Schemas of it.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


class Origin(TypedDict):
    location: str
    revision: str | None
    subfolder: str | None
    library: str | None
    architecture: str | None


class ConvertedOrigin(Origin):
    module: NotRequired[str]
    pipeline: NotRequired[str]


class Parameters(TypedDict):
    total: int
    quantized: int


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


class PushedFile(TypedDict):
    path: str
    bytes: int


class PushedBytes(TypedDict):
    files: int
    uploaded: int


class PushReport(TypedDict):
    """``qz push``."""

    repository: str
    url: str
    branch: str
    subfolder: str | None
    private: bool
    created: bool
    commit: str | None
    pull_request: str | None
    files: list[PushedFile]
    left_out: list[str]
    removed: list[str]
    bytes: PushedBytes
    notes: list[str]
    dry_run: bool


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


class Problem(TypedDict):
    severity: Literal["error", "warning"]
    kind: str
    where: str
    message: str


class Counted(TypedDict):
    compared: int
    all: int


class Difference(TypedDict):
    name: str
    file: str
    bytes: int
    first: int | None
    missing: str | None
    explained: str | None


class Located(TypedDict):
    location: str
    revision: str | None


class Devices(TypedDict):
    recorded: str
    used: str
    bytes_of: str


class VerifyReport(TypedDict):
    """``qz verify``."""

    output: str
    intact: bool
    explained: bool
    files: int | None
    bytes: int | None
    problems: list[Problem]
    statement: str | None
    signed_by: str | None
    source: Located | None
    sample: float | None
    tensors: Counted | None
    tensors_before: int | None
    other_files: Counted | None
    differs: list[Difference] | None
    files_differ: list[str] | None
    device: Devices | None
    warnings: list[str]
    seconds: float


class AttestReport(TypedDict):
    """``qz attest``."""

    output: str
    statement: str
    signature: str | None
    subjects: int
    materials: int
    left_out: list[str]


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


class StoredShare(TypedDict):
    tensors: int
    parameters: int
    bytes: int


class Quantization(TypedDict):
    method: str
    double_quant: bool | None
    block_size: int | None
    compute_dtype: str | None
    storage: str | None
    threshold: float | None
    skipped: list[str] | None
    quantized_parameters: int | None
    quantized_tensors: int | None


class Estimate(TypedDict):
    bytes: int
    memory_footprint: int
    quantized_parameters: int
    exact: bool


class File(TypedDict):
    name: str
    bytes: int
    tensors: int | None


class Tensor(TypedDict):
    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str
    parameters: int
    quantized: str | None
    original: list[int] | None
    part_of: str | None


class Verified(TypedDict):
    files: int
    bytes: int
    intact: bool


class Finding(TypedDict):
    severity: Literal["error", "warning", "note"]
    rule: str
    message: str


class Verdict(TypedDict):
    package: str
    loads: bool | None
    findings: list[Finding]


class InspectedComponent(TypedDict):
    """Of one without weights only what is required here is known, and the rest of it null or not there."""

    name: str
    library: str
    architecture: str | None
    chosen: bool | None
    format: str | None
    parameters: int | None
    bytes: int | None
    quantization: Quantization | None
    memory_footprint: int | None
    dtypes: NotRequired[dict[str, StoredShare]]
    memory_footprint_exact: NotRequired[bool]
    estimates: NotRequired[dict[str, Estimate] | None]
    ties: NotRequired[dict[str, str]]
    files: NotRequired[list[File]]
    problems: NotRequired[list[Problem]]


class InspectReport(TypedDict):
    """``qz inspect``."""

    source: Origin
    format: str | None
    parameters: int | None
    bytes: int | None
    dtypes: dict[str, StoredShare]
    quantization: Quantization | None
    memory_footprint: int | None
    memory_footprint_exact: bool
    estimates: dict[str, Estimate] | None
    ties: dict[str, str]
    files: list[File]
    problems: list[Problem]
    verified: Verified | None
    consumers: dict[str, Verdict]
    tensors: NotRequired[list[Tensor]]
    components: NotRequired[list[InspectedComponent]]


class ExitError(TypedDict):
    """The last line of any command that fails."""

    type: Literal["exit_error"]
    code: int
    message: str


class RecordedFile(TypedDict):
    name: str
    bytes: int
    sha256: str


class WrittenRecord(TypedDict):
    """``qz.json``, the record in an output. ``sha256`` is missing in those of an earlier qz."""

    version: Literal[1]
    about: dict[str, Any]
    files: list[RecordedFile]
    sha256: NotRequired[str]


Conversion = ModelReport | PipelineReport | UpToDateReport

OF_COMMANDS: dict[str, Any] = {
    "quantize": Conversion,
    "dequantize": Conversion,
    "merge": MergeReport,
    "verify": VerifyReport,
    "attest": AttestReport,
    "push": PushReport,
    "calibrate": CalibrateReport,
    "compare": CompareReport,
    "inspect": InspectReport,
}
"""What each command prints with ``--json``; where it fails, ``ExitError`` in a line of its own."""
