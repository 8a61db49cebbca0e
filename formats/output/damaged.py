"""Companions that no loader could read: Git-LFS pointers in the place of files, JSON and weights that were cut off.

Looked for before a run, as far as that costs no more than small reads, and in all that is copied while it is.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qz.counted import shown
from qz.formats.checkpoint.concurrent_reads import several_at_once
from qz.formats.files.folder import read_at
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import GIT_LFS_POINTER, Malformed
from qz.formats.output.file_names import WEIGHT_FILE, is_looked_for
from qz.formats.tensors.safetensors import read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qz.formats.output.companions import Companion

_WHOLE = 1 << 18
"""Bytes of a JSON file that is parsed whole; of a larger one only both ends are looked at."""
_END = 64
_POINTER = range(1, 1024)
"""Bytes of a pointer, by the specification of Git LFS."""
_TOLD = {
    "git-lfs-pointer": (
        ("a Git-LFS pointer, not the file", "Git-LFS pointers, not the files"),
        "Run `git lfs pull`, or download it again.",
    ),
    "json-malformed": (("not valid JSON",) * 2, "Correct that, or download it again."),
    "truncated": (("cut off, or no safetensors file",) * 2, "Download it again."),
}
_NO_HEADER = ("empty-file", "not-safetensors", "header-malformed", "pickle", "gguf")
"""Kinds of what the header of a file of weights is refused for."""


def require_undamaged(carried: Iterable[Companion]) -> None:
    """Raise Malformed for companions that would be copied damaged."""
    for error in damaged(carried).values():
        raise error


def damaged(carried: Iterable[Companion]) -> dict[str, Malformed]:
    """An error for each kind of damage, by the first file that has it. Of a repository on the Hub small files are
    read; ``require_readable`` looks at the others."""
    looked_at = [each for each in carried if each.bytes <= _WHOLE or isinstance(each.folder, LocalFolder)]
    kinds = several_at_once(looked_at[0].folder, _damage, looked_at) if looked_at else []
    found: dict[str, list[Companion]] = {}
    for each, kind in zip(looked_at, kinds, strict=True):
        if kind is not None:
            found.setdefault(kind, []).append(each)
    return {alike[0].name: _error(kind, alike) for kind, alike in sorted(found.items())}


def require_readable(companion: Companion, offset: int, piece: memoryview) -> None:
    """Raise Malformed if this piece of a companion shows that no loader can read the file."""
    first, last = offset == 0, offset + len(piece) == companion.bytes
    kind = None
    if first and last and companion.bytes in _POINTER and bytes(piece).startswith(GIT_LFS_POINTER):
        kind = "git-lfs-pointer"
    elif _is_json(companion):
        if first and last and companion.bytes <= _WHOLE:
            broken = not _parses(bytes(piece))
        else:
            broken = (first and not _begins(bytes(piece[:_END]))) or (last and not _ends(bytes(piece[-_END:])))
        kind = "json-malformed" if broken else None
    if kind is not None:
        raise _error(kind, [companion])


def _damage(companion: Companion) -> str | None:
    """The kind of damage. Raises Malformed where the file cannot be read, or is not the one that it has to be."""
    read, size = read_at(companion.folder, companion.file), companion.bytes
    try:
        if _is_json(companion) or size in _POINTER:
            pieces = [(0, size)] if size <= _WHOLE else [(0, _END), (size - _END, _END)]
            for offset, length in pieces:
                require_readable(companion, offset, memoryview(read(offset, length)))
        if _holds_weights(companion) and isinstance(companion.folder, LocalFolder):
            read_header(read, size, companion.name)
    except Malformed as error:
        if error.kind in _TOLD:
            return error.kind
        if error.kind in _NO_HEADER:
            return "truncated"
        raise  # such as a file that is not as a record says
    return None


def _error(kind: str, found: Sequence[Companion]) -> Malformed:
    names = shown(f"{each.folder.location}/{each.file}" for each in found)
    (one, several), advice = _TOLD[kind]
    what = f"is {one}" if len(found) == 1 else f"are {several}"
    return Malformed(kind, f"{names} {what}. {advice}")


def _is_json(companion: Companion) -> bool:
    """Whether loaders read JSON from it; what else lies there is copied whatever it is."""
    return companion.file.endswith(".json") and is_looked_for(companion.file)


def _holds_weights(companion: Companion) -> bool:
    """Whether it holds weights that are only copied: of a module in a folder, or an adapter."""
    inside = "/" in companion.name or WEIGHT_FILE.fullmatch(companion.file) is None
    return inside and companion.file.endswith(".safetensors")


def _parses(data: bytes) -> bool:
    try:
        json.loads(data.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _begins(data: bytes) -> bool:
    return data.lstrip()[:1] in (b"{", b"[")


def _ends(data: bytes) -> bool:
    return data.rstrip()[-1:] in (b"}", b"]")
