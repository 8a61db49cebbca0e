"""What may become an output: nothing, an empty folder, or a checkpoint to be replaced; never the source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from qz import OutputRefused, QzError
from qz.formats.files.folder import PIPELINE_INDEX
from qz.formats.files.links import followed
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import quoted
from qz.formats.output.file_names import MODULE, TEMPLATES, WEIGHT_FILE, is_checkpoint_file
from qz.formats.output.recorded.record import RECORD, read_record
from qz.formats.output.recorded.statement import BESIDE
from qz.formats.output.storage.beside import ASIDE, PARTIAL, require_name, sibling
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk

MOST_NAMED = 3
"""Files in the way that a refusal names."""


def refuse_output(parent: Directory, name: str, overwrite: bool) -> None:
    """Raise OutputRefused unless there is nothing, an empty folder, or a checkpoint that may be overwritten."""
    what, output = parent.kind(name), parent.path / name
    if what is None:
        return
    if what == "link":
        raise OutputRefused(f"{output} is a symbolic link. Give the folder it points to, or another, with -o/--output.")
    if what != "folder":
        raise OutputRefused(f"{output} exists and is not a folder. Choose another with -o/--output.")
    if os.path.ismount(output):
        raise OutputRefused(f"{output} is a mount point: it cannot be replaced. Choose a folder in it: -o {output}/…")
    if not parent.names(name):
        return
    if not overwrite:
        raise OutputRefused(f"{output} exists and is not empty. Replace it with --overwrite, or choose -o/--output.")
    with parent.enter(name) as folder:
        _require_checkpoint(folder)


def _require_checkpoint(folder: Directory) -> None:
    """Raise OutputRefused, naming what is in the way, unless the folder holds a checkpoint and nothing else.

    With a record of qz, what it lists is the checkpoint; without, what is named as the libraries name it.
    """
    output = folder.path
    recorded = _recorded(output)
    files: list[str] = []
    foreign: list[str] = []
    for name in _walk(folder, recorded):
        belongs = name in recorded if recorded else not name.endswith("/") and _is_own_or_a_librarys(name)
        (files if belongs else foreign).append(name)
        if len(foreign) > MOST_NAMED:
            break
    if foreign:
        shown = ", ".join(quoted(name, 60) for name in foreign[:MOST_NAMED])
        more = " and more" if len(foreign) > MOST_NAMED else ""
        raise OutputRefused(
            f"{output} contains files that are not part of a checkpoint: {shown}{more}. --overwrite does not remove "
            "such files. Move them away, or choose another folder with -o/--output."
        )
    if not recorded and not any(WEIGHT_FILE.fullmatch(name.rpartition("/")[2]) for name in files):
        raise OutputRefused(
            f"{output} is not a checkpoint (it holds no weights): --overwrite does not remove it. "
            "Choose another folder with -o/--output."
        )


def _is_own_or_a_librarys(name: str) -> bool:
    """By its name: also a record that cannot be read any more."""
    return name == RECORD or is_checkpoint_file(name)


def _recorded(output: Path) -> frozenset[str]:
    """What qz wrote there, by its own record; nothing if there is none, or it cannot be read."""
    folder = LocalFolder(output)
    try:
        record = read_record(folder)
    except QzError:
        return frozenset()
    finally:
        folder.close()
    return frozenset({RECORD, *BESIDE, *(file.name for file in record.files)}) if record else frozenset()


def _walk(root: Directory, recorded: frozenset[str], prefix: str = "") -> Iterator[str]:
    """Every file below ``root``; of a folder that is empty, or not one of a checkpoint, its name and a slash."""
    for base in root.names(prefix.rstrip("/")):
        name = prefix + base
        if root.kind(name) != "folder":
            yield name
        elif not root.names(name) or not _is_checkpoint_folder(root, name, recorded):
            yield f"{name}/"
        else:
            yield from _walk(root, recorded, f"{name}/")


def _is_checkpoint_folder(root: Directory, name: str, recorded: frozenset[str]) -> bool:
    if recorded:
        return any(file.startswith(f"{name}/") for file in recorded)
    parent, _, base = name.rpartition("/")
    if base == TEMPLATES:
        return parent.count("/") == 0
    return not parent and (MODULE.fullmatch(base) is not None or root.kind(PIPELINE_INDEX) == "file")


def refuse_overlap(source: Path, output: Path, disk: Disk) -> None:
    """Raise OutputRefused if the output, or what is staged beside it, is the source, inside it, or around it."""
    require_name(output)
    real_source = followed(source)
    real_output = followed(output)
    for place in (real_output, sibling(real_output, PARTIAL), sibling(real_output, ASIDE)):
        if _within(place, real_source, disk) or _within(real_source, place, disk):
            raise OutputRefused(
                f"The output {output} and the source {source} overlap. Choose a folder outside it with -o/--output."
            )


def _within(path: Path, folder: Path, disk: Disk) -> bool:
    """Whether ``path`` is ``folder`` or inside it, also where the same folder goes by two names."""
    found = disk.status(folder)
    for each in (path, *path.parents):
        if each == folder:
            return True
        other = disk.status(each) if found is not None else None
        if found is not None and other is not None and os.path.samestat(found, other):
            return True
    return False
