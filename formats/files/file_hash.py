"""The SHA-256 of a file, by its path or in a folder."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qz import IOFailed, MissingInput, PermissionRefused
from qz.formats.files.folder import in_pieces
from qz.formats.files.regular_file import NotRegular, open_regular
from qz.open_files import remedy

if TYPE_CHECKING:
    from collections.abc import Callable

    from qz.formats.files.folder import Folder


def sha256_in(folder: Folder, file: str, size: int, progress: Callable[[int], None] | None = None) -> str:
    """Of ``size`` bytes of a file in ``folder``, in hexadecimal. ``progress`` is given the bytes of each piece read.

    Raises what ``Folder.read_into`` raises.
    """
    return sha256_by(partial(folder.read_into, file), size, progress)


def sha256_by(read: Callable[[int, memoryview], None], size: int, progress: Callable[[int], None] | None = None) -> str:
    """Of ``size`` bytes that ``read`` fills buffers with, from an offset on. Raises what that raises."""
    digest = hashlib.sha256()
    for piece in in_pieces(read, size, progress):
        digest.update(piece)
    return digest.hexdigest()


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
        advice = remedy(error, "Check the disk, or copy the file again.")
        raise IOFailed(f"{path} cannot be read: {error.strerror}. {advice}") from error
