"""What a dry run refuses because the run would: where nothing can be made, too little room, another run's remains."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qz import IOFailed, OutputRefused
from qz.formats.output.difference import describe_difference
from qz.formats.output.disk import Disk
from qz.formats.output.journal import MAX_BYTES, parse_line
from qz.formats.output.record import as_written
from qz.formats.output.refusals import sibling


def check_room(output: Path, needed: int, disk: Disk) -> None:
    """Raise what beginning an output of ``needed`` bytes would raise. Nothing is left behind.

    IOFailed (too little space), OutputRefused or PermissionRefused (something is in the way, no file can be made).
    """
    output = Path(os.path.realpath(output.parent)) / output.name
    for remains in (sibling(output, ".partial"), sibling(output, ".partial.old")):
        if disk.kind(sibling(output, ".partial.journal")) is None and disk.kind(remains) is not None:
            raise OutputRefused(
                f"{remains} exists, and it is not an interrupted run of qz. Move it away, or write elsewhere with "
                "-o/--output."
            )
    folder = next(each for each in output.parents if disk.status(each) is not None)
    disk.probe(folder / sibling(output, ".partial.journal").name)
    partial = sibling(output, ".partial")
    free = disk.free_bytes(folder) + sum(size for _, size in _files(partial, disk))  # which is kept, or made room of
    if needed > free:
        raise IOFailed(
            f"Not enough space for {output}: it needs {needed:,} bytes, {free:,} are free. "
            "Free some, or write to another disk with -o/--output."
        )


def check_interrupted(output: Path, fingerprint: Mapping[str, Any], disk: Disk) -> None:
    """Raise OutputRefused if an interrupted run with another fingerprint has finished files there."""
    output = Path(os.path.realpath(output.parent)) / output.name
    partial, journal = sibling(output, ".partial"), sibling(output, ".partial.journal")
    there = dict(_files(partial, disk))
    found = disk.status(journal)
    if not there or found is None or not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
        return
    try:
        first, *rest = [parse_line(line) for line in journal.read_bytes().splitlines()]
        earlier = first["fingerprint"]
        finished = [as_written(entry) for entry in rest]
    except (OSError, ValueError, LookupError, TypeError):
        return  # what cannot be read is not continued
    wanted = json.loads(json.dumps(fingerprint))
    if earlier != wanted and any(there.get(file.name) == file.bytes for file in finished):
        raise OutputRefused(
            f"{partial} holds an interrupted run that differs: {describe_difference(earlier, wanted)}. "
            "Repeat that run to continue it, or start over with --no-resume."
        )


def _files(folder: Path, disk: Disk, prefix: str = "") -> list[tuple[str, int]]:
    """Files below a folder, by their relative names, and their sizes."""
    if disk.kind(folder) != "folder":
        return []
    found: list[tuple[str, int]] = []
    for name in disk.names(folder):
        status = disk.status(folder / name)
        if status is not None and stat.S_ISDIR(status.st_mode):
            found += _files(folder / name, disk, f"{prefix}{name}/")
        elif status is not None:
            found.append((prefix + name, status.st_size))
    return found
