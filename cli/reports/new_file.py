"""Files that an option names and a command writes beside its output: pictures and pages."""

from __future__ import annotations

import os
from pathlib import Path

from qz import IOFailed, OutputRefused, PermissionRefused


def require_new(path: Path, option: str) -> None:
    """Raise OutputRefused for a file that is there, or has no folder to be in; PermissionRefused for a folder that
    takes none.
    """
    if path.exists() or path.is_symlink():
        raise OutputRefused(f"{path} exists. Move it away, or choose another file with {option}.")
    if not path.parent.is_dir():
        raise OutputRefused(f"{path.parent} is not a folder. Make it, or choose another file with {option}.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionRefused(
            f"{path.parent} does not allow new files. Change its permissions, or choose another file with {option}."
        )


def store(path: Path, text: str, option: str) -> None:
    """Write a new file; one that appeared under its name in the meantime is not replaced."""
    made = False
    try:
        with path.open("x", encoding="utf-8") as file:
            made = True
            file.write(text)
    except FileExistsError as error:
        raise OutputRefused(
            f"{path} has appeared in the meantime. Move it away, or choose another file with {option}."
        ) from error
    except OSError as error:
        if made:
            path.unlink(missing_ok=True)
        raise IOFailed(f"{path} cannot be written: {error.strerror}. The work that it reports is done.") from error
