"""An output against an in-toto statement, and against the signature of model-signing."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qz import IOFailed, MissingInput, Unsupported
from qz.formats.attestation.signing import require_signed
from qz.formats.checkpoint.problems import Problem
from qz.formats.files.local_folder import LocalFolder
from qz.formats.files.regular_file import NotRegular, TooLarge, read_regular
from qz.formats.json_files import MAX_BYTES
from qz.formats.malformed import Malformed
from qz.formats.output.companions import left_out
from qz.formats.output.recorded.record import verify_files
from qz.formats.output.recorded.statement import BESIDE, SIGNATURE, read_statement
from qz.progress import OnProgress, Progress, ignore
from qz.quantize.inspection.report import Verified
from qz.quantize.verification.report import Verification

if TYPE_CHECKING:
    from qz.formats.source import OpenedSource


WANTED = "--statement names a file in in-toto's form, such as the qz.statement.json that `qz attest` writes."


def verify_stated(output: OpenedSource, statement: Path, progress: OnProgress = ignore) -> Verification:
    """Every file that a statement is about against the hash in it; the others are named, in warnings."""
    begun, done = time.monotonic(), 0
    try:
        data = read_regular(statement, MAX_BYTES)
    except (TooLarge, NotRegular, IsADirectoryError) as error:
        raise Malformed("statement-malformed", f"{statement} is no statement: {error.strerror}. {WANTED}") from None
    except OSError as error:
        kind = MissingInput if isinstance(error, FileNotFoundError) else IOFailed
        raise kind(f"{statement} cannot be read: {error.strerror}. {WANTED}") from None
    try:
        files = read_statement(data, str(statement)).files(output.folder)
    except Malformed as error:
        raise Malformed(error.kind, f"{error} {WANTED}") from None

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(Progress("Verifying", bytes=done, all_bytes=sum(file.bytes for file in files)))

    problems = verify_files(output.folder, files, count)
    problems += _uncovered(output, {file.name for file in files} | BESIDE, "file-unstated", f"by {statement}")
    verified = Verified(len(files), done, not any(problem.severity == "error" for problem in problems))
    return Verification(
        output.location,
        None,
        None,
        verified,
        None,
        problems,
        statement=str(statement),
        notes=output.notes,
        seconds=time.monotonic() - begun,
    )


def with_signature(found: Verification, output: OpenedSource, public_key: Path) -> Verification:
    """With a problem more unless the folder is signed by the key, and a warning for each file that is not signed.

    Unsupported for a repository.
    """
    if not isinstance(output.folder, LocalFolder):
        raise Unsupported(
            f"The signature of {output.location} is checked on a copy of it: `hf download {output.location} "
            "--local-dir COPY`, then `qz verify COPY --public-key KEY`."
        )
    problems = found.problems
    try:
        signed = require_signed(output.folder.path, public_key)
        problems += _uncovered(output, signed | {SIGNATURE}, "file-unsigned", "by the signature")
    except Malformed as error:
        problems += (Problem("error", "signature-invalid", SIGNATURE, str(error)),)
    return replace(found, problems=problems, signed_by=str(public_key))


def _uncovered(output: OpenedSource, covered: Collection[str], kind: str, by: str) -> tuple[Problem, ...]:
    """A warning for each file, or folder, of which nothing is known."""
    others = left_out(output.folder, covered)
    return tuple(Problem("warning", kind, name, f"{name} is not covered {by}.") for name in others)
