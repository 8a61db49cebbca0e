"""An output in the making: everything is staged in ``<output>.partial/``, checked, and renamed into place at the end.

What lies beside the output, and what the next run makes of it (each step is durable before the next begins):

==  ==========================================  =======================================================
    on disk (J = ``<output>.partial.journal``)  next run
==  ==========================================  =======================================================
1   J                                           begins anew
2   J, ``.partial/`` with finished shards       continues: finished shards are kept, all else is removed
3   J, ``.partial/``, ``.partial.old/``,        renames ``.partial.old`` back to the output, then as 2
    no output (only when overwriting)
4   J, output, ``.partial.old/``                removes ``.partial.old`` and J: the output is the new one
5   J, output                                   removes J: done
6   output                                      –
==  ==========================================  =======================================================

J is the lock as well, held by the kernel for the process: it is made first and removed last, so a ``.partial`` without
J is not ours and is left alone; nor is a J that does not begin as a journal. Of what J names, the next run keeps what
it would make itself, with the header that it would write, and by a line that this user wrote; see ``seal``.

All this happens by the descriptors of two folders, the output's parent and ``.partial/``: what is put in the place of
one of them, or of a folder on the way, is neither followed nor written to.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qz import IOFailed, OutputRefused, QzError
from qz.formats.folder import LocalFolder
from qz.formats.output.descriptors import Descriptors
from qz.formats.output.difference import describe_difference
from qz.formats.output.directory import Directory
from qz.formats.output.disk import Disk
from qz.formats.output.journal import Journal, as_fingerprint, held_by_another
from qz.formats.output.record import PIECE, RECORD, WrittenFile, encode_record, require_safe_name
from qz.formats.output.refusals import refuse_output, refuse_overlap, require_name
from qz.formats.output.seal import user_key
from qz.formats.output.shard_writer import (
    TEMPORARY,
    Chunk,
    ShardLayout,
    ShardWriter,
    has_layout,
    hash_file,
    read_back,
    write_chunk,
)
from qz.formats.output.signals import defer_signals

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from qz.formats.folder import Folder

__all__ = ["ShardLayout", "ShardWriter", "Staging", "WrittenFile", "refuse_overlap"]

PARTIAL, ASIDE, JOURNAL = ".partial", ".partial.old", ".partial.journal"
RESUMABLE = 1 << 20
"""Files copied unchanged are worth keeping for a resumed run from this size on; smaller ones are copied again."""


def check_output(output: Path, overwrite: bool, sources: Iterable[Folder], disk: Disk | None = None) -> None:
    """Raise what would be raised later for what lies there at this moment, to spare the user a long planning.

    Raises OutputRefused (it exists, it overlaps a source), PermissionRefused, TryAgain. Nothing is written.
    """
    disk = disk or Disk()
    require_name(output)
    for source in sources:
        if isinstance(source, LocalFolder):
            for place in source.places():
                refuse_overlap(place, output, disk)
    output = Path(os.path.realpath(output.parent)) / output.name
    if disk.status(output.parent) is None:
        return
    journal = f"{output.name}{JOURNAL}"
    with Directory.at(disk, output.parent) as parent:
        descriptor = parent.open_existing(journal)
        if descriptor is None:
            refuse_output(parent, output.name, overwrite)
            return
        try:
            if not disk.try_lock(descriptor, parent.path / journal) and parent.is_same(journal, descriptor):
                raise held_by_another(parent.path / journal)
        finally:
            disk.close(descriptor, parent.path / journal)


IsVerified = Callable[[], bool]


class Staging:
    """A context manager around the making of one output. Without ``commit`` there is no output.

    After an exception, finished shards stay for the next run with the same fingerprint; all else is removed.
    """

    finished: Mapping[str, WrittenFile]
    """Shards that an earlier, interrupted run with the same fingerprint completed."""
    resumed: bool
    notes: tuple[str, ...] = ()
    """What of an earlier run was not kept, in words."""

    def __init__(
        self,
        output: Path,
        fingerprint: Mapping[str, Any],
        *,
        needed: int,
        overwrite: bool = False,
        resume: bool = True,
        about: Mapping[str, Any] | None = None,
        disk: Disk | None = None,
        resumable: Mapping[str, ShardLayout | None] | None = None,
    ) -> None:
        """Lock the output, refuse what cannot work, and find what an earlier run has done.

        ``fingerprint``: JSON values; what must be the same for a resumed run to give the same bytes. ``needed``: bytes
        of the whole output. ``about``: JSON values for the record in the output, nothing private.
        ``resumable``: the files that may be kept from an earlier run, with the layout of shards; all, if it is not
        given.

        Raises OutputRefused (it exists; an interrupted run with another fingerprint is there), TryAgain (another run
        holds it), IOFailed (too little space), PermissionRefused.
        """
        self._disk = disk or Disk()
        self.output = Path(os.path.realpath(output.parent)) / output.name
        if not output.name or output.name == "..":
            raise OutputRefused(f"{output} cannot be an output. Name a new folder with -o/--output.")
        self._name = output.name
        self._resumable = resumable
        self._overwrite, self._about = overwrite, dict(about or {})
        self._unfinished: set[str] = set()
        self._unverified: dict[str, tuple[WrittenFile, IsVerified]] = {}
        self._settling = threading.Lock()
        self._written: dict[str, WrittenFile] = {}
        self._last: dict[str, bytes] = {}
        self._committed = False
        self._partial: Directory | None = None
        self._descriptors: Descriptors | None = None
        self._new_parents = self._disk.make_folder(self.output.parent)
        self._parent = Directory.at(self._disk, self.output.parent)
        locked = False
        try:
            if self._parent.kind(self._name + JOURNAL) is None:
                refuse_output(self._parent, self._name, overwrite)
                self._refuse_foreign_partial()
            with defer_signals():
                self._journal = Journal(self._parent, self._name + JOURNAL, user_key())
                locked = True
                if self._parent.kind(self._name + PARTIAL) == "folder":
                    self._partial = self._parent.enter(self._name + PARTIAL)
                self._recover()
                refuse_output(self._parent, self._name, overwrite)
                self._prepare(as_fingerprint(fingerprint), needed, resume)
        except BaseException as error:
            if locked:
                self._leave(error)
            else:
                self._remove_new_parents()
            self._parent.close()
            raise

    def _refuse_foreign_partial(self) -> None:
        parent, journal = self._parent, self._name + JOURNAL
        for name in (self._name + PARTIAL, self._name + ASIDE):
            before = parent.status(name)
            if before is None or parent.kind(journal) is not None:
                continue
            after = parent.status(name)
            if after is not None and os.path.samestat(before, after) and parent.kind(journal) is None:
                raise OutputRefused(
                    f"{parent.path / name} exists, and it is not an interrupted run of qz. Move it away, or write "
                    "elsewhere with -o/--output."
                )

    def _recover(self) -> None:
        """Finish or take back an exchange of old and new output that a crash interrupted."""
        parent, aside = self._parent, self._name + ASIDE
        if parent.kind(aside) is None:
            return
        if parent.kind(self._name) is None:
            parent.rename(aside, self._name)
            parent.sync()
        elif parent.kind(self._name + PARTIAL) is None:
            parent.remove(aside)
        else:
            raise OutputRefused(
                f"{parent.path / aside} is the output that an interrupted run was replacing, and {self.output} exists "
                "again. Move one of them away."
            )

    def _prepare(self, fingerprint: dict[str, Any], needed: int, resume: bool) -> None:
        journal, parent, partial = self._journal, self._parent, self._name + PARTIAL
        if self._partial is None and parent.kind(partial) is not None:
            raise OutputRefused(f"{parent.path / partial} is not a folder. Move it away.")
        found = {name: file for name, file in journal.finished.items() if self._is_kept(file)}
        others = [name for name in journal.unknown if self._staged_status(name) is not None]
        if resume and (found or others) and journal.fingerprint != fingerprint:
            raise OutputRefused(
                f"{parent.path / partial} holds an interrupted run that differs: "
                f"{describe_difference(journal.fingerprint or {}, fingerprint)}. "
                "Repeat that run to continue it, or start over with --no-resume."
            )
        if not resume or journal.fingerprint != fingerprint:
            found, journal.finished = {}, {}
        self.resumed, self.finished = bool(found), found
        if resume and others:
            count = len(others)
            were = "1 file of an interrupted run was" if count == 1 else f"{count} files of an interrupted run were"
            why = "the journal's lines about it are not sealed with the key in this user's cache (QZ_CACHE)"
            self.notes = (f"{were} made again: {why}",)
        self._written = dict(found)
        if found:
            self._sweep(self._staged, keep=found.keys())
        else:
            self._remove_partial()
        self._require_space(needed - sum(file.bytes for file in found.values()))
        if not found:
            journal.start(fingerprint)
            parent.sync()
            parent.make(partial)
            made = parent.enter(partial)
            if made.names():
                made.close()
                raise OutputRefused(f"{parent.path / partial} was exchanged by someone else. Move it away.")
            self._partial = made
            parent.sync()
        self._descriptors = Descriptors(self._staged)

    @property
    def _staged(self) -> Directory:
        assert self._partial is not None
        return self._partial

    def _remove_partial(self) -> None:
        """Remove the staged folder, and nothing that has come to lie in its place."""
        partial, name = self._partial, self._name + PARTIAL
        if partial is None:
            if self._parent.kind(name) == "folder":  # just made, so it is empty
                with suppress(OutputRefused):
                    self._parent.remove_empty(name)
            return
        is_own = self._parent.is_same(name, partial.descriptor)
        partial.close()
        self._partial = None
        if is_own:
            self._parent.remove(name)

    def _is_kept(self, file: WrittenFile) -> bool:
        """Whether a file of an earlier run is there, and one that this run would make."""
        if self._resumable is not None and file.name not in self._resumable:
            return False
        layout = self._resumable[file.name] if self._resumable is not None else None
        return self._has(file) and (layout is None or has_layout(self._staged, layout))

    def _has(self, file: WrittenFile) -> bool:
        found = self._staged_status(file.name)
        is_file = found is not None and stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        return is_file and found.st_size == file.bytes  # type: ignore[union-attr]

    def _staged_status(self, name: str) -> os.stat_result | None:
        return self._partial.status(name) if self._partial is not None else None

    def _sweep(self, folder: Directory, keep: Collection[str], prefix: str = "") -> None:
        for entry in folder.names(prefix.rstrip("/")):
            name = prefix + entry
            if any(kept.startswith(f"{name}/") for kept in keep) and folder.kind(name) == "folder":
                self._sweep(folder, keep, f"{name}/")
            elif name not in keep:
                folder.remove(name)

    def _require_space(self, needed: int) -> None:
        free = self._disk.free_bytes(self._parent.descriptor, self._parent.path)
        if needed > free:
            raise IOFailed(
                f"Not enough space for {self.output}: it needs {needed:,} bytes, {free:,} are free. "
                "Free some, or write to another disk with -o/--output."
            )

    def open_shard(self, layout: ShardLayout, is_verified: IsVerified = lambda: True) -> ShardWriter:
        """Begin a shard; its space on disk is reserved. May be called, like ``finish``, while others are written.

        ``is_verified``: whether what the shard is made of is known to be right. A later run keeps no shard of which
        this was never true. It may raise what is known to be wrong.
        """
        self._require_new(layout.file)
        self._staged.make_parents(layout.file)

        def done(file: WrittenFile) -> None:
            self._written[file.name] = file
            self._unfinished.discard(file.name)
            self._keep(file, is_verified)

        assert self._descriptors is not None
        writer = ShardWriter(self._staged, layout, self._descriptors, done)
        self._unfinished.add(layout.file)
        return writer

    def read_staged(self, name: str, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from a finished file; False where its bytes are no longer here."""
        descriptor = self._staged.open(name)
        try:
            return self._disk.read(descriptor, self._staged.path / name, buffer, offset) == len(buffer)
        finally:
            self._disk.close(descriptor, self._staged.path / name)

    def give_up(self) -> None:
        """Let no thread wait for anything: the run is over."""

    def _keep(self, file: WrittenFile, is_verified: IsVerified) -> None:
        """Have a finished file that is worth it for a later run."""
        self._note_verified((file, is_verified))

    def _note_verified(self, *new: tuple[WrittenFile, IsVerified]) -> None:
        """Note in the journal what is finished and now settled."""
        with self._settling:
            self._unverified |= {file.name: (file, is_verified) for file, is_verified in new}
            for file, is_verified in list(self._unverified.values()):
                if is_verified():
                    self._journal.add(file)
                    del self._unverified[file.name]

    def distrust(self) -> None:
        """Keep nothing for a later run: the source that the finished shards were made of is no more."""
        self._journal.finished.clear()

    def _require_new(self, name: str) -> None:
        require_safe_name(name)
        if name in self._written or name in self._unfinished or name in self._last or name == RECORD:
            raise ValueError(f"{name} is in the output already")

    def write_file(self, name: str, data: bytes) -> WrittenFile:
        """Add a small file, ``component/x.json`` allowed. Indexes and configs reach the disk last, in ``commit``."""
        self._require_new(name)
        if _rank(name):
            self._last[name] = data
            return WrittenFile(name, len(data), _sha256(data))
        return self._store(name, [memoryview(data)])

    def copy_file(
        self,
        name: str,
        size: int,
        read: Callable[[int, memoryview], None],
        progress: Callable[[int], None] | None = None,
        is_verified: IsVerified = lambda: True,
    ) -> WrittenFile:
        """Add a file of ``size`` bytes, which ``read(offset, buffer)`` gives piece by piece; large ones are resumable.

        ``progress`` is given the bytes of each piece. Indexes and configs reach the disk last, as in ``write_file``.
        ``is_verified``: see ``open_shard``.
        """
        if name in self.finished:
            return self.finished[name]
        if _rank(name):
            data = bytearray(size)
            read(0, memoryview(data))
            if progress is not None:
                progress(size)
            return self.write_file(name, bytes(data))
        self._require_new(name)

        def pieces() -> Iterator[memoryview]:
            buffer = memoryview(bytearray(min(PIECE, size)))
            for start in range(0, size, PIECE):
                piece = buffer[: min(PIECE, size - start)]
                read(start, piece)
                yield piece
                if progress is not None:
                    progress(len(piece))

        self._unfinished.add(name)
        written = self._store(name, pieces(), reserve=size)
        self._unfinished.discard(name)
        if size >= RESUMABLE:
            self._keep(written, is_verified)
        return written

    def adopt(self, folder: Directory, file: WrittenFile) -> None:
        """Move a finished file here from a folder on the same file system.

        It is noted before it is moved, so that whatever happens, it is where this or a later run looks for it.
        """
        self._require_new(file.name)
        self._staged.make_parents(file.name)
        self._journal.add(file)
        self._staged.take(folder, file.name)
        self._written[file.name] = file

    def _store(self, name: str, pieces: Iterable[memoryview], reserve: int = 0) -> WrittenFile:
        folder, disk = self._staged, self._disk
        temporary = folder.path / (name + TEMPORARY)
        folder.make_parents(name)
        chunks: list[Chunk] = []
        size = 0
        descriptor = folder.create(name + TEMPORARY)
        try:
            if reserve:
                disk.reserve(descriptor, temporary, reserve)
            for piece in pieces:
                chunks.append(write_chunk(disk, descriptor, temporary, piece, size))
                size += len(piece)
            written = WrittenFile(name, size, read_back(disk, descriptor, temporary, chunks))
            disk.sync(descriptor, temporary)
        finally:
            disk.close(descriptor, temporary)
        folder.rename(name + TEMPORARY, name)
        folder.sync(name.rpartition("/")[0])
        self._written[name] = written
        return written

    def commit(self, inspect: Callable[[Path], None] = lambda _: None) -> tuple[WrittenFile, ...]:
        """Check everything, write what comes last, and rename the whole into place. All files but the record.

        ``inspect`` is given the folder when all of it is there, and may raise what keeps it from getting its name.
        """
        if self._unfinished:
            raise RuntimeError(f"shards are not finished: {sorted(self._unfinished)}")
        self._close_files()
        self._note_verified()
        for file in self.finished.values():
            self._verify(file)
        for name in sorted(self._last, key=lambda name: (_rank(name), name)):
            self._store(name, [memoryview(self._last[name])])
        written = tuple(sorted(self._written.values(), key=lambda file: file.name))
        self._store(RECORD, [memoryview(encode_record(written, self._about))])  # makes the names of all files durable
        if dict(self._walk(self._staged)) != {file.name: file.bytes for file in self._written.values()}:
            raise IOFailed(f"{self._staged.path} was changed by someone else meanwhile. Run the same command again.")
        inspect(self._staged.path)
        self._publish()
        return written

    def _verify(self, file: WrittenFile) -> None:
        if not self._has(file) or hash_file(self._staged, file.name) != file.sha256:
            self._journal.forget(file.name)
            raise IOFailed(
                f"{self._staged.path / file.name}, made by an earlier run, is damaged. Run the same command again: "
                "it makes this file anew and keeps the others."
            )

    def _walk(self, folder: Directory, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Every name, but for what is in a folder that the run did not make."""
        for entry in folder.names(prefix.rstrip("/")):
            name = prefix + entry
            status = folder.status(name)
            is_folder = status is not None and stat.S_ISDIR(status.st_mode)
            if is_folder and any(file.startswith(f"{name}/") for file in self._written):
                yield from self._walk(folder, f"{name}/")
            else:
                yield name, status.st_size if status is not None and not is_folder else -1

    def _publish(self) -> None:
        with defer_signals():
            self._rename_into_place()

    def _rename_into_place(self) -> None:
        parent, name, partial = self._parent, self._name, self._name + PARTIAL
        refuse_output(parent, name, self._overwrite)
        self._require_in_place(partial)
        replaced = parent.kind(name) is not None and bool(parent.names(name))
        try:
            if replaced:
                parent.rename(name, name + ASIDE)
            parent.rename(partial, name)
            self._committed = True
        except BaseException:
            if replaced and parent.kind(name) is None:
                parent.rename(name + ASIDE, name)
            raise
        exchanged = False
        try:
            exchanged = not parent.is_same(name, self._staged.descriptor)
            if not exchanged:
                parent.sync()
                parent.remove(name + ASIDE)
                self._journal.remove()
                parent.sync()
        except QzError as error:
            raise type(error)(f"{self.output} is complete, but tidying up failed: {error}") from error
        finally:
            if not exchanged:
                self._journal.close()
        if exchanged:  # in the moment before it was renamed
            self._committed = False
            parent.rename(name, partial)
            if replaced:
                parent.rename(name + ASIDE, name)
            self._require_in_place(partial)

    def _require_in_place(self, partial: str) -> None:
        """Raise IOFailed unless the staged folder, and the one that the output is to lie in, are where they were."""
        for place, is_there in (
            (self._staged.path, self._parent.is_same(partial, self._staged.descriptor)),
            (self._parent.path, self._parent.is_at_its_path()),
        ):
            if not is_there:
                raise IOFailed(f"{place} was moved or replaced by someone else meanwhile. Run the same command again.")

    def _close_files(self) -> None:
        if self._descriptors is not None:
            self._descriptors.close_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._committed:
            self._leave(error)
        elif isinstance(error, KeyboardInterrupt):
            error.add_note(f"{self.output} is complete.")
        if self._partial is not None:
            self._partial.close()
        self._parent.close()

    def _leave(self, error: BaseException | None) -> None:
        """Keep what a later run can use, remove the rest, unlock; tell those who interrupted the run."""
        interrupted = isinstance(error, KeyboardInterrupt)
        with nullcontext() if interrupted else defer_signals():  # the signal after an interrupt is not to wait
            self._tidy_up()
        if isinstance(error, KeyboardInterrupt):
            kept = len(self._journal.finished)
            error.add_note(
                f"{kept} finished {'shard is' if kept == 1 else 'shards are'} kept: run the same command again to "
                "continue, or start over with --no-resume."
                if kept
                else "No shard was finished, so nothing is left behind: the same command starts over."
            )

    def _tidy_up(self) -> None:
        with suppress(QzError):
            self._close_files()
            partial = self._partial
            if self._journal.finished and partial is not None:
                if self._parent.is_same(self._name + PARTIAL, partial.descriptor):
                    self._sweep(partial, keep=self._journal.finished.keys())
            else:
                self._remove_partial()
                if self._parent.kind(self._name + ASIDE) is None:
                    self._journal.remove()
        with suppress(QzError):
            self._journal.close()
        self._remove_new_parents()

    def _remove_new_parents(self) -> None:
        """Folders that were made for the output, as far as nothing lies in them: no journal either."""
        with suppress(QzError):
            for folder in self._new_parents:
                self._disk.remove_empty(folder)


def _rank(name: str) -> int:
    """0 for what may be written at once; the later a loader would look for it, the later it is written."""
    base = name.rpartition("/")[2]
    if re.search(r"\.index(\.[^.]+)?\.json$", base):
        return 1
    return 0 if base not in {"config.json", "model_index.json"} else 2 if base == "config.json" else 3


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Section:
    """What is written here lands in the folder ``name`` of the output, or in the output itself where it is empty."""

    elsewhere: Collection[str] = frozenset()
    """Files of this folder that are not made here."""

    def __init__(self, staging: Staging, name: str) -> None:
        self._staging = staging
        self._prefix = f"{name}/" if name else ""

    @property
    def finished(self) -> Mapping[str, WrittenFile]:
        """Shards of this folder that an earlier, interrupted run completed, by their name in it."""
        found = self._staging.finished.items()
        return {name.removeprefix(self._prefix): file for name, file in found if name.startswith(self._prefix)}

    def open_shard(self, layout: ShardLayout, is_verified: IsVerified = lambda: True) -> ShardWriter:
        return self._staging.open_shard(replace(layout, file=self._prefix + layout.file), is_verified)

    def read_staged(self, name: str, offset: int, buffer: memoryview) -> bool:
        return self._staging.read_staged(self._prefix + name, offset, buffer)

    def give_up(self) -> None:
        self._staging.give_up()

    def write_file(self, name: str, data: bytes) -> WrittenFile:
        return self._staging.write_file(self._prefix + name, data)

    def copy_file(
        self,
        name: str,
        size: int,
        read: Callable[[int, memoryview], None],
        progress: Callable[[int], None] | None = None,
        is_verified: IsVerified = lambda: True,
    ) -> WrittenFile:
        return self._staging.copy_file(self._prefix + name, size, read, progress, is_verified)
