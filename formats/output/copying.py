"""Companions are streamed into the output, and checked on the way."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from qz.formats.files.folder import Range
from qz.formats.malformed import Malformed
from qz.formats.output.damaged import require_readable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qz.formats.output.companions import Companion
    from qz.formats.output.section import Section

LARGEST_INDEX = 50_000_000
"""Bytes of an index or config, which are held in memory until the end of the run."""


def copy(carried: Sequence[Companion], section: Section, progress: Callable[[int], None] | None = None) -> None:
    """Stream the files into the output, and check that their folders did not change meanwhile.

    Raises Malformed for a file that no loader can read.
    """
    folders = {id(each.folder): each.folder for each in carried}
    for key, folder in folders.items():
        files = [each for each in carried if id(each.folder) == key and each.name not in section.finished]
        folder.announce([Range(each.file, 0, each.bytes) for each in files if each.bytes])
        for each in files:
            if each.bytes > LARGEST_INDEX and each.name.endswith(("config.json", ".index.json")):
                raise Malformed("json-malformed", f"{folder.location}/{each.file} is too large for such a file.")
            section.copy_file(each.name, each.bytes, _reader(each), progress, partial(folder.is_verified, each.file))
        folder.check()


def _reader(carried: Companion) -> Callable[[int, memoryview], None]:
    def read(offset: int, buffer: memoryview) -> None:
        carried.folder.read_into(carried.file, offset, buffer)
        try:
            require_readable(carried, offset, buffer)
        except Malformed:
            carried.folder.check()  # which tells what was only damaged on its way
            raise

    return read
