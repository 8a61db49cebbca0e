"""What the record of a source that qz wrote promises, for whatever is made from that source."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

from qz.formats.files.folder import PIPELINE_INDEX
from qz.formats.files.links import followed
from qz.formats.files.local_folder import LocalFolder
from qz.formats.files.promised import Promise, Promised
from qz.formats.output.recorded.record import RECORD, read_record

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder


def hold_to_record(root: Folder, file: str | None = None) -> None:
    """Have all that is read of ``root``, and of folders inside, compared with the record in it, if there is one.

    A component here that is part of a pipeline is compared with the pipeline's record. ``file``: the one file that will
    be read. Raises Malformed for a record that is damaged.
    """
    promised = promised_in(root) or _promised_around(root)
    if promised is not None and (file is None or file in promised):
        root.promised = promised


def promised_in(folder: Folder) -> Promised | None:
    """What the record of a folder says of its files; None without one."""
    record = read_record(folder)
    if record is None:
        return None
    files = {file.name: Promise(file.bytes, file.sha256) for file in record.files}
    return Promised(files, f"{folder.location}/{RECORD}")


def _promised_around(root: Folder) -> Promised | None:
    if not isinstance(root, LocalFolder):
        return None
    real = followed(root.path)
    if not all(os.path.isfile(real.parent / name) for name in (RECORD, PIPELINE_INDEX)):
        return None  # in any other folder, a record says nothing of the folders inside
    with closing(LocalFolder(real.parent)) as parent:
        promised = promised_in(parent)
    inner = promised.inside(real.name) if promised is not None else None
    return inner or None
