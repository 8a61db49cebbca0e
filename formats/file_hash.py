"""The SHA-256 of a file that the user names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qz import IOFailed, MissingInput, PermissionRefused


def sha256_of(path: Path) -> str:
    """In hexadecimal. Raises MissingInput, PermissionRefused or IOFailed."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise MissingInput(f"{path} is not a file. Check the path.") from None
    except PermissionError:
        raise PermissionRefused(f"{path} cannot be read: permission denied. Change its permissions.") from None
    except OSError as error:
        raise IOFailed(f"{path} cannot be read: {error.strerror}. Check the disk, or copy the file anew.") from error
