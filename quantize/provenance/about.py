"""What the record in an output says of how it was made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from qz.formats.files.folder import Folder
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.companions import Companion
from qz.formats.output.recorded.record import read_record
from qz.quantize.libraries.examine import library_versions
from qz.quantize.provenance.command import command
from qz.quantize.provenance.fingerprints import settings_fingerprint
from qz.quantize.provenance.source_identity import recorded_identity
from qz.quantize.settings import Settings

TRANSIENT = ("output", "dry_run", "seconds", "shards", "resumed", "up_to_date", "nonfinite")
"""Of a summary, what differs from run to run."""


def hub_origin(folder: Folder) -> dict[str, Any] | None:
    """The repository that a folder which qz wrote comes from in the end: whose license it has, and who may see it.

    Raises Malformed for a damaged record: without an origin, what is private could be made public.
    """
    record = read_record(folder)
    if record is None:
        return None
    origin, source = record.about.get("origin"), record.about.get("source")
    if isinstance(origin, dict):
        return origin
    return source if isinstance(source, dict) and source.get("revision") else None


def about(
    summary: dict[str, Any],
    folders: Mapping[str, Folder],
    carried: Iterable[Companion],
    location: str,
    settings: Settings,
) -> dict[str, Any]:
    """What the record in the output says of how it was made; nothing private, so no local path."""
    from qz import __version__

    folder = folders[""]
    told = {key: value for key, value in summary.items() if key not in TRANSIENT}
    if isinstance(folder, LocalFolder):
        told["source"] = {**told["source"], "location": os.path.basename(os.path.realpath(location))}
        if (origin := hub_origin(folder)) is not None:
            told["origin"] = origin
    told["command"] = command(told["act"], told["source"], settings)
    made_from = {"identity": recorded_identity(folders, carried), "settings": settings_fingerprint(settings)}
    return {"qz": __version__, "versions": library_versions(), **told, **made_from}
