"""What may become an output: nothing, an empty folder, or a checkpoint to be replaced; never the source."""

from __future__ import annotations

import os
from pathlib import Path

from qz import OutputRefused
from qz.formats.output import disk
from qz.formats.output.record import RECORD


def sibling(output: Path, suffix: str) -> Path:
    """A name beside the output, on the same file system."""
    return output.with_name(output.name + suffix)


def refuse_output(output: Path, overwrite: bool) -> None:
    """Raise OutputRefused unless there is nothing, an empty folder, or a checkpoint that may be overwritten."""
    what = disk.kind(output)
    if what is None:
        return
    if what == "link":
        raise OutputRefused(f"{output} is a symbolic link. Give the folder it points to, or another, with -o/--output.")
    if what != "folder":
        raise OutputRefused(f"{output} exists and is not a folder. Choose another with -o/--output.")
    if os.path.ismount(output):
        raise OutputRefused(f"{output} is a mount point: it cannot be replaced. Choose a folder in it: -o {output}/…")
    held = disk.names(output)
    if held and not overwrite:
        raise OutputRefused(f"{output} exists and is not empty. Replace it with --overwrite, or choose -o/--output.")
    if held and (".git" in held or not {"config.json", "model_index.json", RECORD} & set(held)):
        what_else = "a git repository" if ".git" in held else "not a checkpoint (it has no config.json)"
        raise OutputRefused(f"{output} is {what_else}: --overwrite does not remove it. Choose another folder.")


def refuse_overlap(source: Path, output: Path) -> None:
    """Raise OutputRefused if the output, or what is staged beside it, is the source, inside it, or around it."""
    real_source = Path(os.path.realpath(source))
    real_output = Path(os.path.realpath(output))
    for place in (real_output, sibling(real_output, ".partial"), sibling(real_output, ".partial.old")):
        if _within(place, real_source) or _within(real_source, place):
            raise OutputRefused(
                f"The output {output} and the source {source} overlap. Choose a folder outside it with -o/--output."
            )


def _within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or inside it, also where the same folder goes by two names."""
    found = disk.status(folder)
    for each in (path, *path.parents):
        if each == folder:
            return True
        other = disk.status(each) if found is not None else None
        if found is not None and other is not None and os.path.samestat(found, other):
            return True
    return False
