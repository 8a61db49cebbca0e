"""The last line of a command that fails, and the record in an output."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


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
