"""The files of an output in the making: what is swept out, what is there, and in which order the last are written."""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING

from qz.formats.files.folder import PIPELINE_INDEX

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from qz.formats.output.storage.directory import Directory


def sweep(folder: Directory, keep: Collection[str], prefix: str = "") -> None:
    """Remove all but ``keep``, names relative to ``folder``."""
    for entry in folder.names(prefix.rstrip("/")):
        name = prefix + entry
        if any(kept.startswith(f"{name}/") for kept in keep) and folder.kind(name) == "folder":
            sweep(folder, keep, f"{name}/")
        elif name not in keep:
            folder.remove(name)


def sizes_below(folder: Directory, made: Collection[str], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every name and its bytes, -1 for what is no file; nothing of what is in a folder that none of ``made`` is in."""
    for entry in folder.names(prefix.rstrip("/")):
        name = prefix + entry
        status = folder.status(name)
        is_folder = status is not None and stat.S_ISDIR(status.st_mode)
        if is_folder and any(file.startswith(f"{name}/") for file in made):
            yield from sizes_below(folder, made, f"{name}/")
        else:
            yield name, status.st_size if status is not None and not is_folder else -1


def rank(name: str) -> int:
    """0 for what may be written at once; the later a loader would look for it, the later it is written."""
    base = name.rpartition("/")[2]
    if re.search(r"\.index(\.[^.]+)?\.json$", base):
        return 1
    return {"config.json": 2, PIPELINE_INDEX: 3}.get(base, 0)
