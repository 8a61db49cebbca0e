"""What ``qz push`` prints."""

from __future__ import annotations

from typing_extensions import TypedDict


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
