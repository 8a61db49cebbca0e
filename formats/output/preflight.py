"""What a run refuses before it reads anything, and a dry run too: no place or room for the output, another run."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qz import IOFailed
from qz.formats.files.folder import Folder
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.exchange import refuse_foreign_partial
from qz.formats.output.refusals import refuse_output, refuse_overlap
from qz.formats.output.resuming.earlier_run import Resumable, another_run, is_continued
from qz.formats.output.resuming.journal import as_fingerprint, held_by_another, look_into
from qz.formats.output.resuming.seal import user_key
from qz.formats.output.shards.shard_layout import TEMPORARY
from qz.formats.output.storage.beside import JOURNAL, PARTIAL, in_real_folder, require_name, require_room, sibling
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk


def check_output(output: Path, overwrite: bool, sources: Iterable[Folder], disk: Disk | None = None) -> None:
    """Raise now what an existing output would raise later, to spare the user a long planning.

    Raises OutputRefused (it exists, it overlaps a source), PermissionRefused, TryAgain. Nothing is written.
    """
    disk = disk or Disk()
    require_name(output)
    for source in sources:
        if isinstance(source, LocalFolder):
            for place in source.places():
                refuse_overlap(place, output, disk)
    output = in_real_folder(output)
    if disk.status(output.parent) is None:
        return
    journal = output.name + JOURNAL
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
    output = in_real_folder(output)
    place = next(each for each in output.parents if disk.status(each) is not None)
    if place == output.parent:
        disk.probe(place / (output.name + JOURNAL))
    else:
        disk.probe(place / output.relative_to(place).parts[0], "mkdir")
    with Directory.at(disk, place) as folder:
        free = disk.free_bytes(folder.descriptor, place)
        if place == output.parent:
            refuse_foreign_partial(folder, output.name)
            free += sum(_files(folder, output.name + PARTIAL).values())  # kept, or removed to make room
    try:
        require_room(output, needed, free)
    except IOFailed as error:
        raise IOFailed(f"{error} `qz inspect SOURCE --plan` gives the sizes where there is no room for them.") from None


def check_interrupted(
    output: Path, fingerprint: Mapping[str, Any], disk: Disk, resumable: Resumable | None = None
) -> bool:
    """Whether there is an interrupted run to continue. OutputRefused if it has finished files of another fingerprint.

    ``resumable``: see ``Staging``.
    """
    output = in_real_folder(output)
    if disk.status(output.parent) is None:
        return False
    partial, wanted = output.name + PARTIAL, as_fingerprint(fingerprint)
    with Directory.at(disk, output.parent) as folder:
        earlier = look_into(folder, output.name + JOURNAL, user_key())
        if earlier is None or folder.kind(partial) != "folder":
            return False
        if earlier.fingerprint == wanted:
            with folder.enter(partial) as staged:
                return is_continued(earlier, staged, resumable)
        there = _files(folder, partial)
    begun = {place for name in earlier.pieces for place in (name, name + TEMPORARY)}
    finished = any(there.get(file.name) == file.bytes for file in earlier.finished.values())
    if finished or (begun | earlier.unknown) & there.keys():
        raise another_run(sibling(output, PARTIAL), earlier.fingerprint, wanted)
    return False


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
