"""What a run was asked to make, in a form that an output can keep: is what is there already what is asked for now?"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qz import OutputRefused, QzError
from qz.formats.file_hash import sha256_of
from qz.formats.folder import Folder, LocalFolder
from qz.formats.output.disk import Disk
from qz.formats.output.journal import describe_difference
from qz.formats.output.record import RECORD, Record, as_text, read_record
from qz.quantize.methods import Method
from qz.quantize.settings import Settings

if TYPE_CHECKING:
    from qz.formats.publish.destination import PushResult

COUNTED = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Files of a local source that can change what is made of it."""


def settings_fingerprint(settings: Settings) -> dict[str, Any]:
    """The settings that decide the bytes, as JSON values. Device, threads and versions do not."""
    refined: dict[str, Any] = {}  # said only where it is so, as outputs of earlier versions know nothing of it
    if settings.scales != "absmax":
        refined = {"scales": settings.scales, "rounding": settings.rounding}
        if settings.importance is not None:
            refined["importance"] = {"file": settings.importance.name, "sha256": sha256_of(settings.importance)}
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


def method_fingerprint(method: Method | None) -> dict[str, Any] | None:
    return None if method is None else {"name": method.name, **method.config()}


def identity_of(folder: Folder) -> dict[str, Any]:
    """What the source is, without what only this machine knows: a commit of the Hub, or names and sizes of files."""
    if not isinstance(folder, LocalFolder):
        return folder.identity()
    return {"files": {name: found.st_size for name, found in _files(folder)}}


def up_to_date(output: Path, folder: Folder, settings: Settings) -> Record | None:
    """The record of an output that is exactly what a run would make now; None if there is no output.

    Raises OutputRefused if there is one that differs: another source, other settings, damaged, not made by qz, or, as
    ``make`` sees it, older than a file of a local source.
    """
    disk = Disk()
    if disk.kind(output) is None or (disk.kind(output) == "folder" and not disk.names(output)):
        return None
    instead = "Replace it with --if-exists overwrite, or choose another -o/--output."
    try:
        made = LocalFolder(output)
        record = read_record(made)
        if record is None:
            raise OutputRefused(f"{output} exists, and nothing in it says that qz made it. {instead}")
        for file in record.files:
            *parents, name = file.name.split("/")
            inner = made.subfolder("/".join(parents)) if parents else made
            if inner.sizes().get(name) != file.bytes:
                raise OutputRefused(f"{output} is damaged: {file.name} is missing or has another size. {instead}")
    except OutputRefused:
        raise
    except QzError as error:
        raise OutputRefused(f"{output} exists, but cannot be checked: {error} {instead}") from error
    then = {"source": record.about.get("identity"), "settings": record.about.get("settings")}
    now = as_text({"source": identity_of(folder), "settings": settings_fingerprint(settings)})
    if then != now:
        raise OutputRefused(
            f"{output} was made from another source or differently: {describe_difference(then, now)}. {instead}"
        )
    if isinstance(folder, LocalFolder):
        newest = max(((found.st_mtime_ns, name) for name, found in _files(folder)), default=(0, ""))
        if newest[0] > (output / RECORD).stat().st_mtime_ns:
            raise OutputRefused(f"{folder.location}/{newest[1]} is newer than {output}. {instead}")
    return record


def _files(folder: LocalFolder, prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    for name in folder.sizes():
        if name.endswith(COUNTED):
            found = (folder.path / name).stat()
            if stat.S_ISREG(found.st_mode):
                yield prefix + name, found
    if depth:
        for inner in folder.subfolders():
            yield from _files(folder.subfolder(inner), f"{prefix}{inner}/", depth - 1)


@dataclass(frozen=True, slots=True)
class UpToDate:
    """An output of an earlier run that is what this run would make: there is nothing to do."""

    record: Record
    output: Path
    location: str
    """Of the source, as it was named."""
    pushed: PushResult | None = None

    def as_json(self) -> dict[str, Any]:
        """The report of the run that made the output, as of a run that had nothing to do."""
        hidden = ("qz", "versions", "identity", "settings")
        told = {key: value for key, value in self.record.about.items() if key not in hidden}
        source = told.get("source")
        shards = [file for file in self.record.files if file.name.endswith(".safetensors")]
        report = {
            **told,
            "source": {**(source if isinstance(source, dict) else {}), "location": self.location},
            "output": str(self.output),
            "dry_run": False,
            "shards": [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in shards],
            "nonfinite": None,
            "up_to_date": True,
            "resumed": False,
            "seconds": 0.0,
        }
        return report if self.pushed is None else {**report, "push": self.pushed.as_json()}
