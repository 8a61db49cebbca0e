"""What can be wrong with a checkpoint: every kind of problem, and how several become one error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qz import IOFailed, MalformedInput, MissingInput, PermissionRefused, QzError, Unsupported
from qz.formats.malformed import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a checkpoint. An error means that it cannot work; the message says what to do."""

    severity: Literal["error", "warning"]
    kind: str
    where: str
    message: str


# Worst first, each with the error that it raises.
ERRORS: dict[str, type[QzError]] = {
    "not-a-folder": MalformedInput,
    "pipeline-root": MissingInput,
    "adapter-only": Unsupported,
    "original-layout": Unsupported,
    "gguf-only": Unsupported,
    "unsafe-name": MalformedInput,
    "link-outside": MalformedInput,
    "not-a-file": MalformedInput,
    "permission": PermissionRefused,
    "unreadable": MalformedInput,
    "io-failed": IOFailed,
    "config-missing": MissingInput,
    "git-lfs-pointer": MalformedInput,
    "pickle": MalformedInput,
    "pickle-only": MalformedInput,
    "gguf": MalformedInput,
    "json-malformed": MalformedInput,
    "library-unknown": Unsupported,
    "variant-missing": MissingInput,
    "index-missing": MissingInput,
    "weights-missing": MissingInput,
    "index-malformed": MalformedInput,
    "shard-missing": MissingInput,
    "empty-file": MalformedInput,
    "not-safetensors": MalformedInput,
    "truncated": MalformedInput,
    "changed": MalformedInput,
    "header-malformed": MalformedInput,
    "tensor-twice": MalformedInput,
    "tensor-absent": MalformedInput,
    "tensor-elsewhere": MalformedInput,
    "tensor-unindexed": MalformedInput,
    "no-tensors": MalformedInput,
}
WARNINGS = (
    "variant-only",
    "two-layouts",
    "index-metadata",
    "index-total-size",
    "file-unused",
    "pickle-files",
    "custom-code",
)
_PLACES = {kind: place for place, kind in enumerate((*ERRORS, *WARNINGS))}
SHOWN = 12
LINES = 4


def worst_first(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Errors before warnings, each in the order above; what is equally bad keeps its order."""
    return tuple(sorted(problems, key=lambda each: (each.severity == "warning", _PLACES.get(each.kind, len(_PLACES)))))


def kind_of(error: QzError, missing: str) -> str:
    """The kind of problem that ``error`` is; ``missing`` if it says that a file is not there."""
    if isinstance(error, Malformed):
        return error.kind
    if isinstance(error, MissingInput):
        return missing
    return "permission" if isinstance(error, PermissionRefused) else "io-failed"


def as_error(location: str, problems: Sequence[Problem]) -> QzError:
    """One error for all of ``problems``, worst first: at most ``LINES`` lines, one a kind, naming where each occurs."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    error = ERRORS.get(problems[0].kind, MalformedInput)
    if len(problems) == 1:
        return error(problems[0].message)
    lines = []
    for alike in kinds.values():
        others = [problem.where for problem in alike[1:]]
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        lines.append(alike[0].message + (f" Likewise: {', '.join(others[:SHOWN])}{more}." if others else ""))
    if len(lines) > LINES - 1:
        rest = ", ".join(f"{kind} ({len(alike)})" for kind, alike in list(kinds.items())[LINES - 2 :])
        lines = [*lines[: LINES - 2], f"Also: {rest}. `qz inspect {location}` lists them all."]
    return error("\n".join([f"{location} has {len(problems)} problems:", *lines]))
