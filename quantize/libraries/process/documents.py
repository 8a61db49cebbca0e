"""A folder of which the process that builds a class gets the location and the small files it needs, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qz import MissingInput
from qz.formats.files.folder import Range
from qz.formats.files.promised import Promised


class Documents:
    """A ``Folder`` in memory."""

    allow_pickle = False
    named_file: str | None = None
    only: str | None = None
    promised: Promised | None = None

    def __init__(self, location: str) -> None:
        self.location = location
        self._texts: dict[str, bytes] = {}

    def add(self, name: str, text: bytes) -> None:
        self._texts[name] = text

    def sizes(self) -> Mapping[str, int]:
        return {name: len(text) for name, text in self._texts.items()}

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        if file not in self._texts:
            raise MissingInput(f"{self.location}/{file} does not exist.")
        buffer[:] = self._texts[file][offset : offset + len(buffer)]

    def announce(self, ranges: Sequence[Range]) -> None: ...

    def is_verified(self, file: str) -> bool:  # noqa: ARG002
        return True

    def check(self) -> None: ...

    def identity(self) -> dict[str, Any]:
        return {}

    def include(self, name: str, files: Iterable[str]) -> None:  # noqa: ARG002
        raise MissingInput(f"{self.location}/{name} does not exist.")

    def subfolder(self, name: str) -> Documents:
        raise MissingInput(f"{self.location}/{name} does not exist.")

    def subfolders(self) -> Sequence[str]:
        return ()

    def give_up(self) -> None: ...

    def close(self) -> None: ...
