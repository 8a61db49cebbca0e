"""Where an output is, and what lies beside it while it is made, on the same file system."""

from __future__ import annotations

import os
from pathlib import Path

from qz import IOFailed, OutputRefused
from qz.formats.files.links import followed

PARTIAL, ASIDE, JOURNAL = ".partial", ".partial.old", ".partial.journal"


def sibling(output: Path, suffix: str) -> Path:
    """A name beside the output."""
    return output.with_name(output.name + suffix)


def require_name(output: Path) -> None:
    """Raise OutputRefused unless the path ends in the name of a folder, beside which there is room for others."""
    if not output.name or output.name == "..":
        raise OutputRefused(f"{output} cannot be an output. Name a new folder with -o/--output.")


def in_real_folder(output: Path) -> Path:
    """The output by its name in the folder that its path leads to; the name itself may be that of a link."""
    return followed(output.parent) / output.name


def reachable(output: Path) -> Path:
    """The path without ``..`` behind a folder that is not there, through which nothing that is made could be opened."""
    return output if os.path.lexists(output.parent) else Path(os.path.normpath(output))


def require_room(output: Path, needed: int, free: int) -> None:
    """Raise IOFailed if the bytes that the output needs are more than there are free."""
    if needed > free:
        raise IOFailed(
            f"Not enough space for {output}: it needs {needed:,} bytes, {free:,} are free. "
            "Free some, write to another disk with -o/--output, make it in parts (--part 1/N), or keep none here: "
            "--push with --push-only."
        )
