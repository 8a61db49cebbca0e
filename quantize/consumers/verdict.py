"""What a consumer makes of a checkpoint: whether it loads, what it does differently, and what would load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from qz.quantize.consumers.contents import Contents

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """An error keeps the consumer from loading (or from computing rightly); a warning: it computes with something else
    than is stored; a note: what its user has to know. The message says what would load."""

    severity: Severity
    rule: str
    message: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """``loads`` is None where nothing is quantized with bitsandbytes, so that there is nothing to judge."""

    consumer: str
    package: str
    loads: bool | None
    findings: tuple[Finding, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.severity == "error")

    def as_json(self) -> dict[str, Any]:
        return {
            "package": self.package,
            "loads": self.loads,
            "findings": [{"severity": e.severity, "rule": e.rule, "message": e.message} for e in self.findings],
        }


Check = Callable[[Contents], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a consumer does, with the place in its code that does it."""

    name: str
    check: Check
    source: str


@dataclass(frozen=True, slots=True)
class Consumer:
    """A program that loads bitsandbytes checkpoints. ``package``: the version whose code the rules were read from."""

    name: str
    title: str
    package: str
    rules: tuple[Rule, ...]
