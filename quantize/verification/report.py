"""What ``qz verify`` found, as a dataclass that the table and the JSON are two renderings of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qz.formats.checkpoint.problems import Problem
    from qz.quantize.inspection.report import Verified
    from qz.quantize.verification.recomputation import Recomputed


@dataclass(frozen=True)
class Verification:
    """An output against the hashes in its record, or against what its source becomes."""

    output: str
    source: str | None
    """What it was recomputed from; None where the recorded hashes were compared."""
    revision: str | None
    """Of the source."""
    recorded: Verified | None
    recomputed: Recomputed | None
    problems: tuple[Problem, ...]
    """Of the record and the files; what differs from the source is in ``recomputed``."""
    sample: float | None = None
    statement: str | None = None
    """The file whose hashes were compared, instead of the record's."""
    signed_by: str | None = None
    """The key that the folder was to be signed by."""
    recorded_device: str = ""
    """The one whose bytes the output has."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def intact(self) -> bool:
        """Nothing differs, nothing is missing."""
        found = self.recomputed
        unlike = found is not None and bool(found.differences or found.unlike_files)
        return not unlike and not any(problem.severity == "error" for problem in self.problems)

    @property
    def explained(self) -> bool:
        """Whether all that differs is what the libraries write on another device."""
        found = self.recomputed
        if found is None or found.unlike_files or any(problem.severity == "error" for problem in self.problems):
            return False
        return bool(found.differences) and all(each.explained for each in found.differences)

    def as_json(self) -> dict[str, Any]:
        """The contract of ``--json``."""
        found, recorded = self.recomputed, self.recorded
        return {
            "output": self.output,
            "intact": self.intact,
            "explained": self.explained,
            "files": recorded.files if recorded else None,
            "bytes": recorded.bytes if recorded else found.bytes if found else None,
            "problems": self.problems,
            "statement": self.statement,
            "signed_by": self.signed_by,
            "source": {"location": self.source, "revision": self.revision} if self.source is not None else None,
            "sample": self.sample,
            "tensors": {"compared": found.tensors[0], "all": found.tensors[1]} if found else None,
            "tensors_before": found.tensors_before if found else None,
            "other_files": {"compared": found.files[0], "all": found.files[1]} if found else None,
            "differs": [each.as_json() for each in found.differences] if found else None,
            "files_differ": list(found.unlike_files) if found else None,
            "device": {"recorded": self.recorded_device, "used": found.device, "bytes_of": found.bytes_of}
            if found
            else None,
            "warnings": list(self.notes),
            "seconds": round(self.seconds, 3),
        }
