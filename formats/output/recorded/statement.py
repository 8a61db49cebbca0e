"""An in-toto statement beside an output: the SHA-256 of its files, and what they were made of. See ``attestation``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qz import QzError
from qz.formats.files.folder import place_of
from qz.formats.json_files import read_json
from qz.formats.malformed import Malformed
from qz.formats.output.recorded.record import WrittenFile, as_written

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder

STATEMENT = "qz.statement.json"
SIGNATURE = "model.sig"
"""What model-signing calls it."""
BESIDE = frozenset({STATEMENT, SIGNATURE})
"""Files about an output that its record does not list, as they are made afterwards."""
TYPE = "https://in-toto.io/Statement/v1"


@dataclass(frozen=True, slots=True)
class Statement:
    """``subjects``: name and SHA-256 of each file, and its size if it is stated."""

    subjects: Mapping[str, tuple[str, int | None]]

    def files(self, folder: Folder) -> tuple[WrittenFile, ...]:
        """The files as they have to be; one whose size is not stated has the size that it has in ``folder``."""
        return tuple(
            WrittenFile(name, _size(folder, name) if size is None else size, sha256)
            for name, (sha256, size) in sorted(self.subjects.items())
        )


def _size(folder: Folder, name: str) -> int:
    """Of a file that may be in folders of ``folder``; 0 if it is not there."""
    try:
        inner, base = place_of(folder, name)
        return inner.sizes().get(base, 0)
    except QzError:
        return 0


def read_statement(data: bytes, where: str) -> Statement:
    """Malformed if it is no statement, or names no file, one twice, or files outside of a folder."""
    value = read_json(data, where)
    if "dsseEnvelope" in value:
        raise Malformed(
            "statement-malformed",
            f"{where} is a signature, not a statement. Check it with --public-key, and name the statement beside it.",
        )
    if value.get("_type") != TYPE or "predicateType" not in value:
        raise Malformed("statement-malformed", f"{where} is not an in-toto statement of version 1 ({TYPE}).")
    try:
        found = list(map(_subject, value["subject"]))
        subjects = dict(found)
        if not 0 < len(subjects) == len(found):
            raise ValueError("it names a file twice" if found else "it names no file")
        return Statement(subjects)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise Malformed("statement-malformed", f"{where} is damaged ({error}).") from None


def _subject(value: Mapping[str, Any]) -> tuple[str, tuple[str, int | None]]:
    size = (value.get("annotations") or {}).get("bytes")
    known = 0 if size is None else size
    file = as_written({"name": value["name"], "bytes": known, "sha256": value["digest"]["sha256"]})
    return file.name, (file.sha256, size)
