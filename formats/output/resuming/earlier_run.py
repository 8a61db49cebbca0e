"""What an interrupted run left of its output, and what of it the next run takes over."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from qz import OutputRefused
from qz.formats.output.resuming.difference import describe_difference
from qz.formats.output.shards.pieces import Begun, begun_shard, layout_digest
from qz.formats.output.shards.shard_layout import TEMPORARY, ShardLayout, has_layout

if TYPE_CHECKING:
    from pathlib import Path

    from qz.formats.output.recorded.record import WrittenFile
    from qz.formats.output.resuming.journal import Journal, Read
    from qz.formats.output.storage.directory import Directory

Resumable = Mapping[str, ShardLayout | None]
"""The files that may be kept from an earlier run, with the layout of shards."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What is kept of an earlier run. ``notes``: what is not, in words."""

    finished: Mapping[str, WrittenFile] = field(default_factory=dict)
    begun: Mapping[str, Begun] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.finished or self.begun)

    @property
    def names(self) -> set[str]:
        """Of the files that it lies in."""
        return {*self.finished, *(name + TEMPORARY for name in self.begun)}


def take_over(
    journal: Journal,
    staged: Directory | None,
    fingerprint: Mapping[str, Any],
    resumable: Resumable | None,
    partial: Path,
    *,
    resume: bool,
) -> TakenOver:
    """Find what is there and what of it this run would make itself; from then on the journal names no more than that.

    ``staged``: the folder at ``partial``, if there is one. OutputRefused if it is a run with another fingerprint.
    """
    found, others = TakenOver(), 0
    if staged is not None and resume:
        finished = {name: file for name, file in journal.finished.items() if has_file(staged, file)}
        begun = {name for name in journal.pieces if has_begun(staged, name)}
        others = sum(staged.status(name) is not None for name in journal.unknown)
        if (finished or begun or others) and journal.fingerprint != fingerprint:
            raise another_run(partial, journal.fingerprint or {}, fingerprint)
        if journal.fingerprint == fingerprint:
            finished = {name: file for name, file in finished.items() if _would_make(staged, name, resumable)}
            found = TakenOver(finished, dict(_begun(staged, journal, begun - finished.keys(), resumable)))
    journal.finished = dict(found.finished)
    journal.pieces = {name: journal.pieces[name] for name in found.begun}
    if not others:
        return found
    were = "1 file of an interrupted run was" if others == 1 else f"{others} files of an interrupted run were"
    why = "the journal's lines about it are not sealed with the key in this user's cache (QZ_CACHE)"
    return TakenOver(found.finished, found.begun, (f"{were} made again: {why}",))


def is_continued(earlier: Read, staged: Directory, resumable: Resumable | None) -> bool:
    """Whether ``take_over`` would keep something, by sizes and layouts alone: of what was begun, nothing is read."""
    if any(has_file(staged, file) and _would_make(staged, file.name, resumable) for file in earlier.finished.values()):
        return True
    layouts = {name: (resumable or {}).get(name) for name in earlier.pieces if has_begun(staged, name)}
    return any(
        layout is not None and any(piece.layout == layout_digest(layout) for piece in earlier.pieces[name])
        for name, layout in layouts.items()
    )


def another_run(partial: Path, earlier: Mapping[str, Any], wanted: Mapping[str, Any]) -> OutputRefused:
    """The error for remains of a run with another fingerprint."""
    return OutputRefused(
        f"{partial} holds an interrupted run that differs: {describe_difference(earlier, wanted)}. "
        "Repeat that run to continue it, or start over with --no-resume."
    )


def has_file(staged: Directory, file: WrittenFile) -> bool:
    """Whether a regular file of this name and size is there, which goes by no other name."""
    found = staged.status(file.name)
    return _is_file(found) and found.st_size == file.bytes


def has_begun(staged: Directory, name: str) -> bool:
    """Whether a shard that this user began is there, under its name or its temporary one."""
    found = staged.status(name + TEMPORARY) or staged.status(name)
    return _is_file(found) and found.st_uid == os.geteuid()


def _is_file(found: os.stat_result | None) -> TypeGuard[os.stat_result]:
    return found is not None and stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _would_make(staged: Directory, name: str, resumable: Resumable | None) -> bool:
    """Whether a finished file is one that this run would make."""
    if resumable is None:
        return True
    layout = resumable.get(name)
    return name in resumable and (layout is None or has_layout(staged, layout))


def _begun(
    staged: Directory, journal: Journal, names: set[str], resumable: Resumable | None
) -> Iterator[tuple[str, Begun]]:
    for name in sorted(names):
        layout = resumable.get(name) if resumable is not None else None
        if layout is None:
            continue
        if staged.status(name + TEMPORARY) is None:  # finished, but its source was never verified
            staged.rename(name, name + TEMPORARY)
        begun = begun_shard(staged, layout, journal.pieces[name])
        if begun is not None:
            yield name, begun
