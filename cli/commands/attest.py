"""``qz attest``: an in-toto statement of a finished output, and its signature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.cli.options import arguments, reports, selection, signatures
from qz.cli.output import facts, show
from qz.cli.progress import Display
from qz.counted import counted

if TYPE_CHECKING:
    from qz.formats.attestation.attest import Attested


def attest(
    output: arguments.AttestedArg,
    source: signatures.MaterialsOpt = None,
    revision: selection.SourceRevisionOpt = None,
    sign_key: signatures.SignKeyOpt = None,
    as_json: reports.JsonOpt = False,
    quiet: reports.QuietOpt = False,
) -> None:
    """Write an in-toto statement beside an output: its hashes, and those of what it was made of. Sign the folder."""
    from qz import api

    with Display(quiet=quiet) as display:
        found = api.attest(output, source, revision=revision, sign_key=sign_key, on_progress=display)
    show(found.as_json(), as_json=as_json, text=facts(report(found)))


def report(found: Attested) -> list[tuple[str, str]]:
    """The result as labels and values."""
    stated = f"{counted(found.subjects, 'file')} of the output, {counted(found.materials, 'input')} that it was made of"
    rows = [
        ("statement", found.statement),
        ("states", stated),
        ("signature", found.signature or "none: --sign-key signs the folder"),
    ]
    return [*rows, ("left out", ", ".join(found.left_out))] if found.left_out else rows
