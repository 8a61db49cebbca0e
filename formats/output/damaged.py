"""Companions that no loader could read: Git-LFS pointers in the place of files, and JSON that was cut off."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qz.counted import shown
from qz.formats.files.folder import read_at
from qz.formats.files.local_folder import LocalFolder
from qz.formats.json_files import is_pointer
from qz.formats.malformed import Malformed
from qz.formats.output.companions import CHECKPOINT_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qz.formats.output.companions import Companion

_WHOLE = 1 << 18
"""Bytes of a JSON file that is parsed whole; of a larger one only both ends are looked at."""
_END = 64


def require_undamaged(carried: Iterable[Companion]) -> None:
    """Raise Malformed for companions that would be copied damaged. Those on the Hub have the hashes that it lists, and
    are not read for this."""
    local = [each for each in carried if isinstance(each.folder, LocalFolder)]
    pointers = [each for each in local if 0 < each.bytes < 1024 and is_pointer(_part(each, 0, each.bytes))]
    if pointers:
        what = "a Git-LFS pointer, not the file" if len(pointers) == 1 else "Git-LFS pointers, not the files"
        raise Malformed("git-lfs-pointer", f"{_named(pointers)} {what}. Run `git lfs pull`, or download it again.")
    broken = [each for each in local if each.file.endswith(".json") and _is_broken(each)]
    if broken:
        raise Malformed("json-malformed", f"{_named(broken)} not valid JSON. Correct that, or download it again.")


def _named(found: list[Companion]) -> str:
    names = shown(f"{each.folder.location}/{each.file}" for each in found)
    return f"{names} {'is' if len(found) == 1 else 'are'}"


def _is_broken(companion: Companion) -> bool:
    """Whether a file that loaders look for is no JSON; what else lies there is copied whatever it is."""
    if CHECKPOINT_FILE.fullmatch(companion.file) is None:
        return False
    if companion.bytes > _WHOLE:
        start, end = _part(companion, 0, _END), _part(companion, companion.bytes - _END, _END)
        return start.lstrip()[:1] not in (b"{", b"[") or end.rstrip()[-1:] not in (b"}", b"]")
    try:
        json.loads(_part(companion, 0, companion.bytes).decode())
    except (ValueError, RecursionError):
        return True
    return False


def _part(companion: Companion, offset: int, length: int) -> bytes:
    return bytes(read_at(companion.folder, companion.file)(offset, length))
