"""What a run refuses before it reads anything, and a dry run at all: no place or room for the output, another run."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qz import IOFailed, OutputRefused
from qz.formats.folder import Folder, LocalFolder
from qz.formats.output.directory import Directory
from qz.formats.output.disk import Disk
from qz.formats.output.earlier_run import another_run
from qz.formats.output.exchange import ASIDE, JOURNAL, PARTIAL
from qz.formats.output.journal import LARGEST, as_fingerprint, held_by_another, read_journal
from qz.formats.output.refusals import refuse_output, refuse_overlap, require_name
from qz.formats.output.seal import user_key
from qz.formats.output.shard_layout import TEMPORARY


def check_output(output: Path, overwrite: bool, sources: Iterable[Folder], disk: Disk | None = None) -> None:
    """Raise what would be raised later for what lies there at this moment, to spare the user a long planning.

    Raises OutputRefused (it exists, it overlaps a source), PermissionRefused, TryAgain. Nothing is written.
    """
    disk = disk or Disk()
    require_name(output)
    for source in sources:
        if isinstance(source, LocalFolder):
            for place in source.places():
                refuse_overlap(place, output, disk)
    output = Path(os.path.realpath(output.parent)) / output.name
    if disk.status(output.parent) is None:
        return
    journal = f"{output.name}{JOURNAL}"
    with Directory.at(disk, output.parent) as parent:
        descriptor = parent.open_existing(journal)
        if descriptor is None:
            refuse_output(parent, output.name, overwrite)
            return
        try:
            if not disk.try_lock(descriptor, parent.path / journal) and parent.is_same(journal, descriptor):
                raise held_by_another(parent.path / journal)
        finally:
            disk.close(descriptor, parent.path / journal)


def check_room(output: Path, needed: int, disk: Disk) -> None:
    """Raise what beginning an output of ``needed`` bytes would raise. Nothing is left behind.

    IOFailed (too little space), OutputRefused or PermissionRefused (something is in the way, no file can be made).
    """
    output = Path(os.path.realpath(output.parent)) / output.name
    place = next(each for each in output.parents if disk.status(each) is not None)
    disk.probe(place / f"{output.name}{JOURNAL}")
    with Directory.at(disk, place) as folder:
        free = disk.free_bytes(folder.descriptor, place)
        if place == output.parent:
            for remains in (output.name + PARTIAL, output.name + ASIDE):
                if folder.kind(output.name + JOURNAL) is None and folder.kind(remains) is not None:
                    raise OutputRefused(
                        f"{place / remains} exists, and it is not an interrupted run of qz. Move it away, or write "
                        "elsewhere with -o/--output."
                    )
            free += sum(_files(folder, output.name + PARTIAL).values())  # which is kept, or makes room
    if needed > free:
        raise IOFailed(
            f"Not enough space for {output}: it needs {needed:,} bytes, {free:,} are free. "
            "Free some, or write to another disk with -o/--output."
        )


def check_interrupted(output: Path, fingerprint: Mapping[str, Any], disk: Disk) -> None:
    """Raise OutputRefused if an interrupted run with another fingerprint has finished files there."""
    output = Path(os.path.realpath(output.parent)) / output.name
    if disk.status(output.parent) is None:
        return
    name = output.name + JOURNAL
    with Directory.at(disk, output.parent) as folder:
        there = _files(folder, output.name + PARTIAL)
        descriptor = folder.open_existing(name)
        if descriptor is None:
            return
        try:
            if (size := disk.size(descriptor, folder.path / name)) > LARGEST:
                return
            text = bytearray(size)
            disk.read(descriptor, folder.path / name, memoryview(text), 0)
        finally:
            disk.close(descriptor, folder.path / name)
    earlier = read_journal(bytes(text), user_key())
    wanted = as_fingerprint(fingerprint)
    if earlier is None or earlier.fingerprint == wanted:
        return
    begun = {place for name in earlier.pieces for place in (name, name + TEMPORARY)}
    finished = any(there.get(file.name) == file.bytes for file in earlier.finished.values())
    if finished or (begun | earlier.unknown) & there.keys():
        raise another_run(Path(f"{output}{PARTIAL}"), earlier.fingerprint, wanted)


def _files(folder: Directory, name: str) -> dict[str, int]:
    """Files in the folder of this name, however deep, by their names relative to it, and their sizes."""
    found: dict[str, int] = {}
    inner = [name] if folder.kind(name) == "folder" else []
    while inner:
        parent = inner.pop()
        for each in folder.names(parent):
            status = folder.status(f"{parent}/{each}")
            if status is not None and stat.S_ISDIR(status.st_mode):
                inner.append(f"{parent}/{each}")
            elif status is not None:
                found[f"{parent}/{each}".removeprefix(f"{name}/")] = status.st_size
    return found
