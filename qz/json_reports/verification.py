"""What ``qz verify`` and ``qz attest`` print."""

from __future__ import annotations

from typing_extensions import TypedDict

from qz.json_reports.shared import Problem


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
