"""What ``qz inspect`` prints."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from qz.json_reports.shared import Origin, Problem


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
