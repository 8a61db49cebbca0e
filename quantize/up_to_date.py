"""What a run was asked to make, in a form that an output can keep: is what is there already what is asked for now?"""

from __future__ import annotations

import os
import stat
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import OutputRefused, QzError
from qz.formats.file_hash import sha256_of
from qz.formats.folder import Folder, place_of
from qz.formats.local_folder import LocalFolder
from qz.formats.output.recorded.record import RECORD, Record, as_text, read_record
from qz.formats.output.resuming.difference import describe_difference
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk
from qz.formats.source import local_path, open_source
from qz.quantize.methods import Method
from qz.quantize.reports.of_record import kind_of, kind_of_bytes, report_of_record
from qz.quantize.settings import Settings
from qz.quantize.single_files.configs import config_digest
from qz.quantize.source_identity import changed_file

if TYPE_CHECKING:
    from qz.formats.publish.destination import PushResult


def settings_fingerprint(settings: Settings) -> dict[str, Any]:
    """The settings that decide the bytes, as JSON values. Device, threads and versions do not."""
    refined: dict[str, Any] = {}  # only where it applies, because outputs of earlier versions do not have it
    if settings.scales != "absmax":
        refined = {"scales": settings.scales, "rounding": settings.rounding}
        if settings.importance is not None:
            refined["importance"] = {"file": settings.importance.name, "sha256": sha256_of(settings.importance)}
    named = ("file", "variant")
    refined |= {name: value for name in named if (value := getattr(settings, name)) is not None}
    if settings.config is not None:
        refined["config"] = config_fingerprint(settings.config)
    if settings.layout != "diffusers":
        refined["layout"] = settings.layout
    if settings.loras:
        refined["loras"] = [lora.as_json() for lora in settings.loras]
    if settings.chooses_layers:
        refined |= {
            "target_size": settings.target_size,
            "max_loss": settings.max_loss,
            "split_groups": settings.split_groups,
        }
        if settings.scores is not None:
            refined["scores"] = {"file": settings.scores.name, "sha256": sha256_of(settings.scores)}
    if settings.experts:
        refined["experts"] = True
    return {
        "method": method_fingerprint(settings.method),
        "dtype": settings.dtype,
        "skips": list(settings.skips),
        "default_skips": settings.default_skips,
        "max_shard_bytes": settings.max_shard_bytes,
        "keep_nonfinite": settings.keep_nonfinite,
        "weights_only": settings.weights_only,
        "components": list(settings.components) if settings.components is not None else None,
        "component_methods": {name: method_fingerprint(method) for name, method in settings.component_methods.items()},
        **refined,
    }


def config_fingerprint(named: str) -> str | dict[str, str]:
    """A repository's name; of a folder its own name, and the SHA-256 of the config in it, or of all of a pipeline's."""
    path = local_path(named)
    if path is None:
        return named
    with closing(open_source(named)) as folder:
        return {"folder": os.path.basename(os.path.realpath(path)), "sha256": config_digest(folder)}


def method_fingerprint(method: Method | None) -> dict[str, Any] | None:
    """The settings of a method that decide the bytes."""
    return None if method is None else {"name": method.name, **method.config()}


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
