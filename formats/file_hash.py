"""The SHA-256 of a file that the user names."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qz import IOFailed, MissingInput, PermissionRefused
from qz.formats.regular_file import NotRegular, open_regular


def sha256_of(path: Path) -> str:
    """In hexadecimal. Raises MissingInput, PermissionRefused or IOFailed."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, NotRegular):
        raise MissingInput(f"{path} is not a file. Check the path.") from None
    except PermissionError:
        raise PermissionRefused(f"{path} cannot be read: permission denied. Change its permissions.") from None
    except OSError as error:
        raise IOFailed(f"{path} cannot be read: {error.strerror}. Check the disk, or copy the file anew.") from error
