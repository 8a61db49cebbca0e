"""Which source something is made of: a commit of the Hub, or those files of a local folder that are read for it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qz.formats.files.folder import Folder
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.companions import Companion
from qz.formats.output.file_names import WEIGHT_FILE, is_checkpoint_file


def identity(folders: Mapping[str, Folder], carried: Iterable[Companion]) -> dict[str, Any]:
    """What must be the same when an interrupted run goes on, once everything is planned: JSON values.

    Of local files the size and the time, for each of ``folders`` the opened ones, and those that are ``carried``.
    """
    found = {name: folder.identity() for name, folder in folders.items()}
    local = [(each.folder, each.file) for each in carried if isinstance(each.folder, LocalFolder)]
    companions = {os.path.join(folder.identity()["folder"], file): list(folder.stamp(file)) for folder, file in local}
    return {**found.pop("", {}), **found, **({"companions": {"files": companions}} if companions else {})}


def recorded_identity(folders: Mapping[str, Folder], carried: Iterable[Companion]) -> dict[str, Any]:
    """The same for the record in the output, without what only this machine knows: names and sizes, no times."""
    root = folders[""]
    if not isinstance(root, LocalFolder):
        return root.identity()
    sizes: dict[str, int] = {}
    local = [folder for folder in folders.values() if isinstance(folder, LocalFolder)]
    opened = ((folder, name) for folder in local for name in folder.opened())
    copied = ((each.folder, each.file) for each in carried if isinstance(each.folder, LocalFolder))
    for folder, file in (*opened, *copied):
        name = os.path.relpath(folder.path / file, root.path)
        if not name.startswith(".."):  # not a config elsewhere, whose path is private
            sizes[name] = folder.stamp(file)[0]
    return {"files": dict(sorted(sizes.items()))}


def changed_file(folder: LocalFolder, recorded: Mapping[str, Any], made: int, *, weights_only: bool) -> str | None:
    """The first file that makes an output out of date, in words; None if there is none.

    ``recorded``: names and sizes of the files that were read for it. ``made``: when it was finished, in nanoseconds.
    Other files do not matter, but for new ones that would be read now.
    """
    for name, size in recorded.items():
        try:
            found = os.stat(os.path.join(folder.path, name))
        except OSError:
            return f"{name} is no longer there"
        if found.st_size != size:
            return f"{name} has another size"
        if found.st_mtime_ns > made:
            return f"{name} is newer"
    if folder.named_file is not None:
        return None
    for name, path in _checkpoint_files(folder, weights_only=weights_only):
        found = os.stat(path)
        if name not in recorded and max(found.st_mtime_ns, found.st_ctime_ns) > made:
            return f"{name} was added"
    return None


def _checkpoint_files(folder: LocalFolder, *, weights_only: bool) -> Iterable[tuple[str, Path]]:
    for prefix, each in (("", folder), *((f"{name}/", folder.subfolder(name)) for name in folder.subfolders())):
        for name in each.sizes():
            if WEIGHT_FILE.fullmatch(name) or (is_checkpoint_file(name) and not weights_only):
                yield prefix + name, each.path / name
