"""``qz.json``, the one file qz adds to a checkpoint: every other file's size and SHA-256, to check them again later.

Loaders take files by name and never look at this one. It holds names, sizes, hashes (its own included) and what the
caller says about how the checkpoint was made: no path, host or user of the machine that made it, and the same bytes for
the same checkpoint.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from qz import QzError
from qz.formats.checkpoint.problems import Problem, kind_of
from qz.formats.files.folder import Range, read_file
from qz.formats.json_files import MAX_BYTES, read_json
from qz.formats.malformed import UNSAFE_TEXT, Malformed, quoted
from qz.formats.output.recorded.about import check_about

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qz.formats.files.folder import Folder

RECORD = "qz.json"
NO_UTF8 = re.compile("[\ud800-\udfff]")
COMPARED = ("identity", "settings")
"""What later runs compare with their own, so it is kept as it is; all else is there to be shown."""
MOST_PARTS, LONGEST_PART = 16, 255
"""Folders and the file in the name of a file, and bytes of each."""
_SHA256 = re.compile("([0-9a-f]{64})?")
"""In hexadecimal; empty in a journal, for a file that is no good after all."""
OWN_HASH, _ZEROS = "sha256", b"0" * 64
"""The record's last key: the SHA-256 of the record itself, with zeros in the place of these digits."""
_WITHOUT_HASH = {"version", "about", "files"}
"""The keys of a record of an earlier qz, which has no such hash."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file as it was written: its name relative to the output, its size, and its SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


class Record(NamedTuple):
    """What a checkpoint was when it was finished. ``about``: how it was made, as JSON values.

    ``is_hashed``: a change of the record itself would have been seen.
    """

    files: tuple[WrittenFile, ...]
    about: Mapping[str, Any]
    is_hashed: bool = True


def encode_record(files: Iterable[WrittenFile], about: Mapping[str, Any]) -> bytes:
    """The record's JSON, whatever the order of ``files``."""
    listed = [asdict(file) for file in sorted(files, key=lambda file: file.name)]
    told = {key: as_text(value, NO_UTF8 if key in COMPARED else UNSAFE_TEXT) for key, value in about.items()}
    value = {"version": 1, "about": told, "files": listed, OWN_HASH: _ZEROS.decode()}
    data = (json.dumps(value, indent=2) + "\n").encode()
    before, _, after = data.rpartition(_ZEROS)
    return before + hash_of(data).encode() + after


def hash_of(data: bytes) -> str:
    """Its SHA-256, in hexadecimal."""
    import hashlib  # imported here: it loads OpenSSL, and most commands read no record

    return hashlib.sha256(data).hexdigest()


def as_text(value: Any, unsafe: re.Pattern[str] = NO_UTF8) -> Any:
    """JSON values in which bytes of a file name that are not UTF-8, which JSON cannot hold, are written as ``\\udcff``;
    and so is everything else that ``unsafe`` finds.
    """
    if isinstance(value, str):
        return unsafe.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), value)
    if isinstance(value, dict):
        return {as_text(key, unsafe): as_text(inner, unsafe) for key, inner in value.items()}
    return [as_text(inner, unsafe) for inner in value] if isinstance(value, list | tuple) else value


def read_record(folder: Folder) -> Record | None:
    """The record of a checkpoint, or None if there is none; Malformed if it is damaged."""
    if RECORD not in folder.sizes():
        return None
    where = f"{folder.location}/{RECORD}"
    if (size := folder.sizes()[RECORD]) > MAX_BYTES:
        raise Malformed("record-malformed", f"{where} is {size:,} bytes long, which is too large for such a file.")
    return record_of(read_file(folder, RECORD, MAX_BYTES), where)


def record_of(data: bytes, where: str) -> Record:
    """The record in these bytes; Malformed, naming ``where``, if they are none, or not as they were written."""
    value = read_json(data, where)
    about, listed = value.get("about"), value.get("files")
    if value.get("version") != 1 or not isinstance(about, dict) or not isinstance(listed, list):
        raise Malformed("record-malformed", f"{where} is not a record of version 1. A newer qz may read it.")
    try:
        check_about(about)
        return Record(tuple(as_written(entry) for entry in listed), about, _is_hashed(data, value))
    except (ValueError, TypeError, LookupError) as error:
        raise Malformed("record-malformed", f"{where} is damaged ({error}). Make the checkpoint again.") from None


def _is_hashed(data: bytes, value: Mapping[str, Any]) -> bool:
    """Whether the record has a hash of itself; ValueError if that is not the one of ``data``."""
    if OWN_HASH not in value:
        if unknown := value.keys() - _WITHOUT_HASH:
            raise ValueError(f"it has {quoted(min(unknown))} and no {OWN_HASH}")
        return False
    own = str(value[OWN_HASH])
    before, _, after = data.rpartition(own.encode())
    if not own or hash_of(before + _ZEROS + after) != own:
        raise ValueError(f"it is not as qz wrote it: its own {OWN_HASH} differs")
    return True


def damaged_record(folder: Folder) -> tuple[Problem, ...]:
    """A warning if the record cannot be read: loaders do without it, but qz does not convert or publish the folder."""
    try:
        read_record(folder)
    except QzError as error:
        return (Problem("warning", kind_of(error, "record-missing"), RECORD, str(error)),)
    return ()


def verify_record(folder: Folder, progress: Callable[[int], None] | None = None) -> tuple[Problem, ...]:
    """Read every recorded file again and compare. ``progress`` is given the bytes of each piece read.

    Problems are returned, not raised: no or a damaged record, files that are missing, of another size or SHA-256, and,
    as warnings, weights that are not recorded and a record without a hash of itself.
    """
    try:
        record = read_record(folder)
    except QzError as error:
        return (Problem("error", kind_of(error, "record-missing"), RECORD, str(error)),)
    if record is None:
        why = f"{folder.location} has no {RECORD}: qz did not write it, so there is nothing to compare it with."
        return (Problem("error", "record-missing", RECORD, why),)
    recorded = {file.name for file in record.files}
    unrecorded = (
        Problem("warning", "file-unrecorded", name, f"{name} was not there when qz finished {folder.location}.")
        for name in sorted(folder.sizes())
        if name.endswith(".safetensors") and name not in recorded
    )
    return (*verify_files(folder, record.files, progress), *unrecorded, *unhashed(record))


def unhashed(record: Record) -> tuple[Problem, ...]:
    """A warning for a record of an earlier qz."""
    if record.is_hashed:
        return ()
    why = f"{RECORD} has no SHA-256 of itself, because an earlier qz wrote it: changes to it cannot be seen."
    return (Problem("warning", "record-unhashed", RECORD, why),)


def verify_files(
    folder: Folder, files: Iterable[WrittenFile], progress: Callable[[int], None] | None = None
) -> tuple[Problem, ...]:
    """Read these files again and compare, as ``verify_record`` does; others are ignored."""
    listed = sorted(files, key=lambda file: file.name.rpartition("/")[0])
    found: list[Problem | None] = []
    for parent, inside in groupby(listed, key=lambda file: file.name.rpartition("/")[0]):
        found += _verify_folder(folder, parent, list(inside), progress)
    return tuple(problem for problem in found if problem is not None)


def _verify_folder(
    root: Folder, parent: str, files: list[WrittenFile], progress: Callable[[int], None] | None
) -> list[Problem | None]:
    """The recorded files of one folder."""
    again = "Make the checkpoint again, or get an undamaged copy."
    try:
        folder = root
        for name in PurePosixPath(parent).parts:
            folder = folder.subfolder(name)
        sizes = folder.sizes()
    except QzError as error:
        why = f"{error} {again}"
        return [Problem("error", kind_of(error, "file-missing"), file.name, why) for file in files]
    found: list[Problem | None] = []
    whole: list[WrittenFile] = []
    for file in files:
        size = sizes.get(PurePosixPath(file.name).name)
        if size is None:
            found.append(Problem("error", "file-missing", file.name, f"{file.name} is missing. {again}"))
        elif size != file.bytes:
            why = f"{file.name} is {size:,} bytes long; it was written with {file.bytes:,}. {again}"
            found.append(Problem("error", "size-differs", file.name, why))
        else:
            whole.append(file)
    folder.announce([Range(PurePosixPath(file.name).name, 0, file.bytes) for file in whole if file.bytes])
    found += (_verify(folder, file, progress) for file in whole)
    if folder is not root:
        folder.close()
    return found


def _verify(folder: Folder, file: WrittenFile, progress: Callable[[int], None] | None) -> Problem | None:
    from qz.formats.files.file_hash import sha256_in  # imported here: it loads OpenSSL, and most readers do not verify

    try:
        found = sha256_in(folder, PurePosixPath(file.name).name, file.bytes, progress)
    except QzError as error:
        return Problem("error", kind_of(error, "file-missing"), file.name, str(error))
    if found != file.sha256:
        again = "Make the checkpoint again, or get an undamaged copy."
        why = f"{file.name} has the SHA-256 {found}; it was written with {file.sha256}. {again}"
        return Problem("error", "hash-differs", file.name, why)
    return None


def as_written(entry: Mapping[str, Any]) -> WrittenFile:
    """A file from its JSON; ValueError, TypeError or LookupError if it is not one, or names one outside the folder."""
    file = WrittenFile(entry["name"], entry["bytes"], entry["sha256"])
    if [type(value) for value in (file.name, file.bytes, file.sha256)] != [str, int, str]:
        raise TypeError("an entry is not a file")
    if file.bytes < 0 or _SHA256.fullmatch(file.sha256) is None:
        raise ValueError(f"{quoted(file.name)} has an invalid size or hash")
    require_safe_name(file.name)
    return file


def require_safe_name(name: str) -> None:
    """Raise ValueError unless ``name`` is a relative path that stays inside the folder."""
    parts = PurePosixPath(name).parts
    is_relative = bool(parts) and name == "/".join(parts) and parts[0] != "/" and ".." not in parts
    is_short = len(parts) <= MOST_PARTS and all(len(part.encode(errors="replace")) <= LONGEST_PART for part in parts)
    if not is_relative or not is_short or UNSAFE_TEXT.search(name):
        raise ValueError(f"{quoted(name)} does not name a file inside the folder")
