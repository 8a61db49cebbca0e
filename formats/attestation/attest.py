"""Make the in-toto statement of a finished output, with provenance in the terms of SLSA, and sign the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, OutputRefused, PermissionRefused
from qz.formats.attestation.materials import materials
from qz.formats.attestation.signing import sign
from qz.formats.files.local_folder import LocalFolder
from qz.formats.files.regular_file import read_regular
from qz.formats.output.recorded.record import RECORD
from qz.formats.output.recorded.statement import BESIDE, SIGNATURE, STATEMENT, TYPE
from qz.formats.output.storage.whole_file import write_whole
from qz.formats.publish.checkpoint_files import OwnFile, own_files
from qz.progress import OnProgress, Progress, ignore

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder

PROVENANCE = "https://slsa.dev/provenance/v1"
PACKAGE = "pkg:pypi/qz-cli"


@dataclass(frozen=True, slots=True)
class Attested:
    """What was written beside an output. ``signature``: None where it was not signed."""

    output: str
    statement: str
    signature: str | None
    subjects: int
    materials: int
    left_out: tuple[str, ...]
    """Files in the folder that are not the output's: neither stated nor signed."""

    def as_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "statement": self.statement,
            "signature": self.signature,
            "subjects": self.subjects,
            "materials": self.materials,
            "left_out": list(self.left_out),
        }


def attest(
    output: Path, source: Folder | None = None, sign_key: Path | None = None, progress: OnProgress = ignore
) -> Attested:
    """Compare every file with the record, and write what can be said of them: the same bytes each time.

    ``source``: see ``materials``. Raises MalformedInput for an output that is not as qz wrote it, OutputRefused where a
    signature of another statement is there and no key to sign anew.
    """
    local, done = LocalFolder(output), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(Progress("Reading", bytes=done))

    try:
        own = own_files(local, count)
        if own.record is None:
            raise MalformedInput(f"{output} has no {RECORD}, so how it was made is not known: qz did not write it.")
        found = materials(own.record.about, source, count)
        subjects = [_subject(file) for file in own.files if file.name not in BESIDE]
        data = _encoded(subjects, found, own.record.about)
        own.require_same()
        _require_no_other_signature(output, data, sign_key)
        _write(output / STATEMENT, data)
        if sign_key is not None:
            progress(Progress("Signing"))
            _write(output / SIGNATURE, sign(output, sign_key, own.left_out))
    finally:
        local.close()
    return Attested(
        str(output),
        str(output / STATEMENT),
        str(output / SIGNATURE) if sign_key is not None else None,
        len(subjects),
        len(found),
        own.left_out,
    )


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, [memoryview(data)])
    except PermissionRefused as error:
        raise PermissionRefused(
            f"{path.parent} takes no new file: {path.name} lies beside the files that it is about. Change the "
            "permissions of that folder, or attest a copy of it."
        ) from error


def _subject(file: OwnFile) -> dict[str, Any]:
    return {"name": file.name, "digest": {"sha256": file.sha256}, "annotations": {"bytes": file.bytes}}


def _encoded(subjects: list[dict[str, Any]], found: list[dict[str, Any]], about: Mapping[str, Any]) -> bytes:
    version = str(about.get("qz"))
    value = {
        "_type": TYPE,
        "subject": subjects,
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{PACKAGE}#{about.get('act')}",
                "externalParameters": {"command": about.get("command"), "settings": about.get("settings")},
                "internalParameters": {key: about[key] for key in ("device", "bytes_of") if key in about},
                "resolvedDependencies": found,
            },
            "runDetails": {
                "builder": {
                    "id": f"{PACKAGE}@{version}",
                    "version": {"qz": version, **(about.get("versions") or {})},
                }
            },
        },
    }
    return (json.dumps(value, indent=2) + "\n").encode()


def _holds(file: Path, data: bytes) -> bool:
    try:
        return read_regular(file, len(data)) == data
    except OSError:
        return False


def _require_no_other_signature(output: Path, data: bytes, sign_key: Path | None) -> None:
    signed, stated = output / SIGNATURE, output / STATEMENT
    if sign_key is None and signed.exists() and not _holds(stated, data):
        raise OutputRefused(f"{signed} is of another statement. Sign this one with --sign-key, or remove it.")
