"""From what the user typed to a folder: a local path, or a repository on the Hub."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qz import MissingInput
from qz.formats.folder import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qz.formats.folder import Folder

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_source(source: str, subfolder: str | None = None, revision: str | None = None) -> Folder:
    """The folder that ``source`` names; MissingInput if it is neither a local folder nor a repository id.

    A path that exists is local; one that begins with ``.``, ``/`` or ``~``, or has more than one slash, cannot be
    anything else.
    """
    path = Path(source).expanduser()
    folder: Folder
    if path.exists() or path.is_symlink():
        folder = LocalFolder(path, shared_links=True)
    elif _REPO_ID.fullmatch(source):
        from qz.formats.hub.repository import open_repo

        folder = open_repo(source, revision=revision)
    else:
        raise MissingInput(f"{source} does not exist. Give a local folder, or a repository on the Hub as USER/NAME.")
    return enter(folder, subfolder)


def enter(folder: Folder, subfolder: str | None) -> Folder:
    """The folder inside ``folder`` that ``--subfolder`` names; ``folder`` itself where it names none."""
    for name in subfolder.strip("/").split("/") if subfolder else ():
        folder = folder.subfolder(name)
    return folder


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A source as it was named, and opened: ``folder`` is what ``subfolder`` names of ``root``, or ``root`` itself."""

    location: str
    subfolder: str | None
    root: Folder
    folder: Folder


@contextmanager
def opened(location: str, subfolder: str | None = None, revision: str | None = None) -> Iterator[OpenedSource]:
    """The source, closed afterwards. Raises MissingInput, and what the Hub answers."""
    root = folder = open_source(location, None, revision)
    try:
        folder = enter(root, subfolder)
        yield OpenedSource(location, subfolder, root, folder)
    finally:
        folder.close()
        root.close()


def output_name(source: str, subfolder: str | None, suffix: str) -> str:
    """The default output: the repository's or folder's name, the subfolder and the method, joined by dashes."""
    name = Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source.split("/")[-1]
    return "-".join([name or "model", *(subfolder.strip("/").split("/") if subfolder else ()), suffix])


def download(folder: Folder, files: Iterable[str], progress: Callable[[str, int], None] | None = None) -> None:
    """Fill the Hub cache with ``files`` of a repository's folder, to be read from there; a local folder has them.

    ``progress(file, bytes)`` is called from several threads when a file is there.
    """
    if not isinstance(folder, LocalFolder):
        from qz.formats.hub.repository import HubFolder

        assert isinstance(folder, HubFolder)
        folder.download(files, progress)


def is_restricted(folder: Folder) -> bool:
    """Whether it is a repository that not everyone may read: private or gated."""
    return bool(getattr(folder, "private", False) or getattr(folder, "gated", False))
