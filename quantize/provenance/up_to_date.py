"""Whether the output that is there already is what is asked for now."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import OutputRefused, QzError
from qz.formats.files.folder import Folder, place_of
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import RECORD, Record, as_text, read_record
from qz.formats.output.resuming.difference import describe_difference
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk
from qz.quantize.provenance.fingerprints import settings_fingerprint
from qz.quantize.provenance.source_identity import changed_file
from qz.quantize.reports.of_record import kind_of, kind_of_bytes, report_of_record
from qz.quantize.settings import Settings

if TYPE_CHECKING:
    from qz.formats.publish.destination import PushResult


def up_to_date(output: Path, folder: Folder, settings: Settings) -> Record | None:
    """The record of an output that is exactly what a run would make now; None if there is no output.

    Raises OutputRefused if there is one that differs: another source, other settings, damaged, not made by qz, or, as
    ``make`` sees it, older than a file of a local source that is read.
    """
    disk = Disk()
    there = disk.status(output)
    if there is None:
        return None
    if stat.S_ISDIR(there.st_mode):
        with Directory.at(disk, output) as inside:
            if not inside.names():
                return None
    instead = "Replace it with --if-exists overwrite, or choose another -o/--output."
    try:
        made = LocalFolder(output)
        record = read_record(made)
        if record is None:
            raise OutputRefused(f"{output} exists, and was not written by qz (no {RECORD}). {instead}")
        for file in record.files:
            inner, name = place_of(made, file.name)
            if inner.sizes().get(name) != file.bytes:
                raise OutputRefused(f"{output} is damaged: {file.name} is missing or has another size. {instead}")
    except OutputRefused:
        raise
    except QzError as error:
        raise OutputRefused(f"{output} exists, but cannot be checked: {error} {instead}") from error
    identity = record.about.get("identity")
    recorded = identity.get("files") if isinstance(identity, dict) else None
    then: dict[str, Any] = {"settings": record.about.get("settings")}
    now: dict[str, Any] = {"settings": settings_fingerprint(settings)}
    if settings.device != "auto":  # "auto" takes any device, and accepts whichever was used
        then["device"], now["device"] = kind_of_bytes(record.about), kind_of(settings.device)
    if not (isinstance(folder, LocalFolder) and isinstance(recorded, dict)):
        then["source"], now["source"] = identity, folder.identity()
    if then != as_text(now):
        raise OutputRefused(
            f"{output} was made from a different source or with different settings "
            f"({describe_difference(then, as_text(now))}). {instead}"
        )
    if isinstance(folder, LocalFolder) and isinstance(recorded, dict):
        finished = (output / RECORD).stat().st_mtime_ns
        changed = changed_file(folder, recorded, finished, weights_only=settings.weights_only)
        if changed is not None:
            raise OutputRefused(
                f"{output} was made from a different source: in {folder.location}, {changed}. {instead}"
            )
    return record


@dataclass(frozen=True, slots=True)
class UpToDate:
    """An output of an earlier run that is what this run would make: there is nothing to do."""

    record: Record
    output: Path
    location: str
    """Of the source, as it was named."""
    pushed: PushResult | None = None
    notes: tuple[str, ...] = ()
    """What the user should know of where the source's files come from."""

    def as_json(self) -> dict[str, Any]:
        """The report of the run that made the output, as of a run that had nothing to do."""
        report = {
            **report_of_record(self.record, self.output, self.notes),
            "nonfinite": None,
            "up_to_date": True,
            "resumed": False,
            "seconds": 0.0,
        }
        source = report["source"]
        report["source"] = {**source, "location": self.location}
        return report if self.pushed is None else {**report, "push": self.pushed.as_json()}
