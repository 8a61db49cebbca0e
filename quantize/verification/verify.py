"""``qz verify``: an output against its record, or against what its source becomes with the record's settings."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import MalformedInput, UsageError
from qz.formats.output.recorded.record import RECORD, Record, read_record
from qz.formats.source import OpenedSource, opened
from qz.progress import OnProgress, ignore
from qz.quantize.inspection.verification import verify as compare_hashes
from qz.quantize.verification.report import Verification

if TYPE_CHECKING:
    from qz.formats.folder import Folder


def verify_record(output: OpenedSource, progress: OnProgress = ignore) -> Verification:
    """Every byte against the hashes that were recorded when it was written."""
    begun = time.monotonic()
    verified, problems = compare_hashes(output.folder, output.root, progress)
    seconds = time.monotonic() - begun
    return Verification(output.location, None, None, verified, None, problems, notes=output.notes, seconds=seconds)


def verify_against(
    output: OpenedSource,
    location: str,
    *,
    revision: str | None = None,
    importance: Path | None = None,
    allow_pickle: bool = False,
    sample: float | None = None,
    device: str = "auto",
    threads: int = 0,
    progress: OnProgress = ignore,
) -> Verification:
    """Every tensor and file against what the source at ``location`` becomes; ``sample``: a share of them, 0 to 1.

    ``revision``: of the source, by default the recorded commit where it has the recorded name.
    """
    from qz.quantize.verification.recomputation import recompute
    from qz.quantize.verification.recorded_settings import recorded_settings

    if sample is not None and not 0 < sample <= 1:
        raise UsageError(f"--sample {sample:%} is not a share of more than 0 % and at most 100 %.")
    begun = time.monotonic()
    record = _record(output.folder)
    settings = recorded_settings(record.about, importance, device, threads, allow_pickle=allow_pickle)
    with _source(location, revision, record.about, allow_pickle=allow_pickle) as source:
        commit = source.folder.identity().get("commit")
        found = recompute(
            output.folder,
            record,
            source,
            settings,
            sample=sample,
            seed=secrets.randbits(32),
            progress=progress,
        )
        notes = (*output.notes, *source.notes, *found.notes, *_other_versions(record.about))
    return Verification(
        output.location,
        location,
        commit,
        None,
        found,
        (),
        sample,
        str(record.about.get("device", "")),
        notes,
        time.monotonic() - begun,
    )


def _record(folder: Folder) -> Record:
    record = read_record(folder)
    if record is None:
        raise MalformedInput(
            f"{folder.location} has no {RECORD}, so how it was made is not known. Only what qz wrote can be recomputed."
        )
    return record


def _source(
    location: str, revision: str | None, about: Mapping[str, Any], *, allow_pickle: bool
) -> AbstractContextManager[OpenedSource]:
    told = about.get("source") or {}
    if revision is None and told.get("location") == location:
        revision = told.get("revision")
    return opened(location, told.get("subfolder"), revision, allow_pickle=allow_pickle)


def _other_versions(about: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the libraries is not as it was."""
    from qz import __version__
    from qz.quantize.libraries.examine import library_versions

    then = {"qz": about.get("qz"), **(about.get("versions") or {})}
    now = {"qz": __version__, **library_versions()}
    unlike = [f"{name} {then.get(name)} → {version}" for name, version in now.items() if then.get(name) != version]
    return (f"it was made with other versions: {', '.join(unlike)}",) if unlike else ()
