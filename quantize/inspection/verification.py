"""Every byte of a checkpoint against the hashes that qz recorded when it wrote it: ``qz inspect --verify``."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from qz import QzError
from qz.formats.checkpoint.problems import Problem
from qz.formats.files.folder import Folder
from qz.formats.output.recorded.record import RECORD, Record, read_record, verify_record
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.inspection.report import Verified


def verify(folder: Folder, root: Folder, on_progress: OnProgress = ignore) -> tuple[Verified, tuple[Problem, ...]]:
    """Compare every file with the record of ``folder``, or of the repository ``root`` if only that has one."""
    if RECORD not in folder.sizes() and RECORD in root.sizes():
        folder = root
    record = _record(folder)
    sizes = [file.bytes for file in record.files] if record is not None else []
    ends, total, done = list(accumulate(sizes)), sum(sizes), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(Progress("Verifying", bisect_right(ends, done), len(sizes), done, total, unit="file"))

    problems = verify_record(folder, count)
    return Verified(len(sizes), done, not any(problem.severity == "error" for problem in problems)), problems


def _record(folder: Folder) -> Record | None:
    """The record, if it can be read; ``verify_record`` says what is wrong with it."""
    try:
        return read_record(folder)
    except QzError:
        return None
