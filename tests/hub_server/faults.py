"""Refusals with the Hub's headers, and faults that tests order."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Answer(Exception):
    """An error status with the Hub's headers."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()} | (
            {"X-Error-Code": code} if code else {}
        )
        if message:
            self.headers["X-Error-Message"] = message.replace("\n", " ")


@dataclass
class Fault:
    """What goes wrong with the requests of one kind, from the ``nth`` on, ``times`` times.

    kind: see ``Handler.route``, or "*". matching: only requests whose path contains it. status, code, message, headers:
    answered instead of the real answer. before: called first (moves a ref, flips visibility). truncate: so many bytes
    of the body are sent, then the connection closes. drop: closed without an answer. hang: seconds before the answer.
    stall: seconds before the last byte. corrupt: one byte of the body differs. ignore_range: the whole file with 200.
    reset: with ``truncate``, the connection ends with RST instead of FIN. trickle: bytes a second of the body.
    body: of the answer that ``status`` gives, instead of the Hub's JSON. seconds: the fault ends so long after it first
    struck, however often that was. lacking: a reconstruction without its last term.
    replace: headers of the real answer that are replaced (None: left out). lose_answer: the commit is made, and the
    connection closes before its answer.
    """

    kind: str
    nth: int = 1
    times: int = 1_000_000
    matching: str = ""
    status: int | None = None
    code: str | None = None
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    truncate: int | None = None
    drop: bool = False
    hang: float = 0.0
    stall: float = 0.0
    lose_answer: bool = False
    corrupt: bool = False
    ignore_range: bool = False
    replace: Mapping[str, str | None] = field(default_factory=dict)
    reset: bool = False
    trickle: float = 0.0
    body: bytes | None = None
    seconds: float = 0.0
    lacking: bool = False
    seen: int = 0
    began: float = 0.0

    def strikes(self, kind: str, path: str) -> bool:
        if self.kind not in (kind, "*") or self.matching not in path:
            return False
        self.seen += 1
        if not self.nth <= self.seen < self.nth + self.times:
            return False
        self.began = self.began or time.monotonic()
        return not self.seconds or time.monotonic() - self.began < self.seconds
