"""An output in the making: everything is staged in ``<output>.partial/``, checked, and renamed into place at the end.

What lies beside the output, and what the next run makes of it (each step is durable before the next begins):

==  ==========================================  =======================================================
    on disk (J = ``<output>.partial.journal``)  next run
==  ==========================================  =======================================================
1   J                                           begins anew
2   J, ``.partial/`` with finished shards, or   continues: those are kept, and of a shard the tensors that are whole
    the finished tensors of one                 and as they were written; all else is removed
3   J, ``.partial/``, ``.partial.old/``,        renames ``.partial.old`` back to the output, then as 2
    no output (only when overwriting)
4   J, output, ``.partial.old/``                removes ``.partial.old`` and J: the output is the new one
5   J, output                                   removes J: done
6   output                                      –
==  ==========================================  =======================================================

J is the lock as well, held by the kernel for the process: it is made first and removed last, so a ``.partial`` without
J is not ours and is left alone; nor is a J that does not begin as a journal. Of what J names, the next run keeps what
it would make itself, with the header or layout that it would write, and by a line that this user wrote; see ``seal``.

All this happens by the descriptors of two folders, the output's parent and ``.partial/``: what is put in the place of
one of them, or of a folder on the way, is neither followed nor written to.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qz import IOFailed, OutputRefused, QzError
from qz.formats.files.folder import in_pieces
from qz.formats.output.exchange import Exchange, recover, refuse_foreign_partial
from qz.formats.output.recorded.record import RECORD, WrittenFile, encode_record, require_safe_name
from qz.formats.output.refusals import refuse_output
from qz.formats.output.resuming.earlier_run import has_file, take_over
from qz.formats.output.resuming.in_words import kept_in_words
from qz.formats.output.resuming.journal import Journal, as_fingerprint
from qz.formats.output.resuming.pending import IsVerified, Pending
from qz.formats.output.resuming.seal import user_key
from qz.formats.output.shards.checksums import hash_file
from qz.formats.output.shards.shard_layout import TEMPORARY, ShardLayout
from qz.formats.output.shards.shard_writer import ShardWriter
from qz.formats.output.shards.stored_file import store_file
from qz.formats.output.staged_files import rank, sizes_below, sweep
from qz.formats.output.storage.beside import ASIDE, JOURNAL, PARTIAL, in_real_folder, require_name, require_room
from qz.formats.output.storage.descriptors import Descriptors
from qz.formats.output.storage.directory import Directory
from qz.formats.output.storage.disk import Disk
from qz.formats.output.storage.signals import defer_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from qz.formats.output.resuming.earlier_run import Resumable
    from qz.formats.output.shards.pieces import Begun

RESUMABLE = 1 << 20
"""Files copied unchanged are worth keeping for a resumed run from this size on; smaller ones are copied again."""


class Staging:
    """A context manager around the making of one output. Without ``commit`` there is no output.

    After an exception, finished shards and what was kept of others stay for the next run with the same fingerprint; all
    else is removed.
    """

    finished: Mapping[str, WrittenFile]
    """Shards that an earlier, interrupted run with the same fingerprint completed."""
    begun: Mapping[str, Begun]
    """What is kept of those that it began."""
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
        resumable: Resumable | None = None,
    ) -> None:
        """What ``with`` is to take; see ``__enter__``.

        ``fingerprint``: JSON values; what must be the same for a resumed run to give the same bytes. ``needed``: bytes
        of the whole output. ``about``: JSON values for the record in the output, nothing private.
        ``resumable``: the files that may be kept from an earlier run, with the layout of shards; all, if it is not
        given. Raises OutputRefused for a name that no output may have.
        """
        self._disk = disk or Disk()
        require_name(output)
        self.output = in_real_folder(output)
        self._name = output.name
        self._resumable = resumable
        self._fingerprint, self._needed, self._resume = fingerprint, needed, resume
        self._overwrite, self._about = overwrite, dict(about or {})
        self._unfinished: set[str] = set()
        self._written: dict[str, WrittenFile] = {}
        self._last: dict[str, bytes] = {}
        self._committed = False
        self._partial: Directory | None = None
        self._descriptors: Descriptors | None = None

    def __enter__(self) -> Self:
        """Lock the output, refuse what cannot work, and find what an earlier run has done.

        An interrupt undoes it, or comes in the block: Python looks for one when it calls, not between the two.

        Raises OutputRefused (it exists; an interrupted run with another fingerprint is there), TryAgain (another run
        holds it), IOFailed (too little space), PermissionRefused.
        """
        self._new_parents = self._disk.make_folder(self.output.parent)
        try:
            self._parent = Directory.at(self._disk, self.output.parent)
        except BaseException:
            self._remove_new_parents()
            raise
        locked = False
        try:
            if self._parent.kind(self._name + JOURNAL) is None:
                refuse_output(self._parent, self._name, self._overwrite)
                refuse_foreign_partial(self._parent, self._name)
            with defer_signals():
                self._journal = Journal(self._parent, self._name + JOURNAL, user_key())
                locked = True
                self._pending = Pending(self._journal)
                if self._parent.kind(self._name + PARTIAL) == "folder":
                    self._partial = self._parent.enter(self._name + PARTIAL)
                recover(self._parent, self._name)
                refuse_output(self._parent, self._name, self._overwrite)
                self._prepare(as_fingerprint(self._fingerprint))
        except BaseException as error:
            if locked:
                self._leave(error)
            else:
                self._remove_new_parents()
            self._parent.close()
            raise
        return self

    def _prepare(self, fingerprint: dict[str, Any]) -> None:
        journal, parent, partial = self._journal, self._parent, self._name + PARTIAL
        if self._partial is None and parent.kind(partial) is not None:
            raise OutputRefused(f"{parent.path / partial} is not a folder. Move it away.")
        found = take_over(
            journal, self._partial, fingerprint, self._resumable, parent.path / partial, resume=self._resume
        )
        self.resumed, self.finished, self.begun, self.notes = bool(found), found.finished, found.begun, found.notes
        self._written = dict(found.finished)
        if found:
            sweep(self._staged, keep=found.names)
        else:
            self._remove_partial()
        self._require_space(self._needed - self._bytes_there())
        if not found:
            journal.start(fingerprint)
            parent.sync()
            parent.make(partial)
            made = parent.enter(partial)
            if made.names():
                made.close()
                raise OutputRefused(f"{parent.path / partial} was replaced by someone else. Move it away.")
            self._partial = made
            parent.sync()
        self._descriptors = Descriptors(self._staged)

    def _bytes_there(self) -> int:
        """Bytes of what is kept; the space of a shard that was begun is reserved already."""
        begun = (self._staged_status(name + TEMPORARY) for name in self.begun)
        allocated = sum(found.st_blocks * 512 for found in begun if found is not None)
        return allocated + sum(file.bytes for file in self.finished.values())

    def is_worth_keeping(self, nbytes: int, seconds: float) -> bool:
        """Whether so many bytes of whole tensors of a shard are worth a ``keep`` so many seconds after the last one."""
        return nbytes >= self._disk.keep_every and seconds >= self._disk.keep_apart

    @property
    def _staged(self) -> Directory:
        assert self._partial is not None
        return self._partial

    def _remove_partial(self) -> None:
        """Remove the staged folder, but nothing that was put in its place."""
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

    def _staged_status(self, name: str) -> os.stat_result | None:
        return self._partial.status(name) if self._partial is not None else None

    def _require_space(self, needed: int) -> None:
        require_room(self.output, needed, self._disk.free_bytes(self._parent.descriptor, self._parent.path))

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
        writer = ShardWriter(self._staged, layout, self._descriptors, done, self.begun.get(layout.file))
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

    def keep(self, shard: ShardWriter, tensors: Collection[str], is_verified: IsVerified) -> None:
        """Have these tensors of a shard, which are whole, for a later run. ``is_verified``: see ``open_shard``."""
        piece = shard.store(tensors)
        if piece is not None:
            self._pending.add(piece, is_verified)

    def _keep(self, file: WrittenFile, is_verified: IsVerified) -> None:
        """Have a finished file that is worth it for a later run."""
        self._pending.add(file, is_verified)

    def distrust(self) -> None:
        """Keep nothing for a later run: what the finished shards were made of has changed, or they cannot be read."""
        self._journal.finished.clear()
        self._journal.pieces.clear()

    def _require_new(self, name: str) -> None:
        require_safe_name(name)
        if name in self._written or name in self._unfinished or name in self._last or name == RECORD:
            raise ValueError(f"{name} is in the output already")

    def write_file(self, name: str, data: bytes) -> WrittenFile:
        """Add a small file, ``component/x.json`` allowed. Indexes and configs reach the disk last, in ``commit``."""
        self._require_new(name)
        if rank(name):
            self._last[name] = data
            return WrittenFile(name, len(data), hashlib.sha256(data).hexdigest())
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
        if rank(name):
            data = bytearray(size)
            read(0, memoryview(data))
            if progress is not None:
                progress(size)
            return self.write_file(name, bytes(data))
        self._require_new(name)
        self._unfinished.add(name)
        written = self._store(name, in_pieces(read, size, progress), reserve=size)
        self._unfinished.discard(name)
        if size >= RESUMABLE:
            self._keep(written, is_verified)
        return written

    def record(self, found: Mapping[str, Any]) -> None:
        """Add to what the record says of the making: JSON values, known only now."""
        self._about.update(found)

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
        self._written[name] = store_file(self._staged, name, pieces, reserve)
        return self._written[name]

    def commit(self, inspect: Callable[[Path], None] = lambda _: None) -> tuple[WrittenFile, ...]:
        """Check everything, write what comes last, and rename the whole into place. All files but the record.

        ``inspect`` is given the folder when all of it is there, and may raise what keeps it from getting its name.
        """
        if self._unfinished:
            raise RuntimeError(f"shards are not finished: {sorted(self._unfinished)}")
        self._close_files()
        self._pending.settle()
        for file in self.finished.values():
            self._verify(file)
        for name in sorted(self._last, key=lambda name: (rank(name), name)):
            self._store(name, [memoryview(self._last[name])])
        written = tuple(sorted(self._written.values(), key=lambda file: file.name))
        self._store(RECORD, [memoryview(encode_record(written, self._about))])  # makes all names durable
        if dict(sizes_below(self._staged, self._written)) != {file.name: file.bytes for file in self._written.values()}:
            raise IOFailed(f"{self._staged.path} was changed by someone else meanwhile. Run the same command again.")
        inspect(self._staged.path)
        self._publish()
        return written

    def _verify(self, file: WrittenFile) -> None:
        if not has_file(self._staged, file) or hash_file(self._staged, file.name) != file.sha256:
            self._journal.forget(file.name)
            raise IOFailed(
                f"{self._staged.path / file.name}, made by an earlier run, is damaged. Run the same command again: "
                "it makes this file anew and keeps the others."
            )

    def _publish(self) -> None:
        exchange = Exchange(self._parent, self._name, self._staged)
        try:
            with defer_signals():
                exchange.carry_out(self._journal, overwrite=self._overwrite)
        finally:
            self._committed = exchange.done

    def _close_files(self) -> None:
        if self._descriptors is not None:
            self._descriptors.close_all()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._committed:
            self._leave(error)
        elif isinstance(error, KeyboardInterrupt):
            error.add_note(f"{self.output} is complete.")
        if self._partial is not None:
            self._partial.close()
        self._parent.close()

    def _leave(self, error: BaseException | None) -> None:
        """Keep what a later run can use, remove the rest, unlock, and note on the error what is kept."""
        interrupted = isinstance(error, KeyboardInterrupt)
        with nullcontext() if interrupted else defer_signals():  # a second interrupt must not be held back
            self._tidy_up()
        if error is not None:  # libraries may have turned the interrupt into another error
            error.add_note(kept_in_words(len(self._journal.finished), len(self._journal.pieces)))

    def _tidy_up(self) -> None:
        with suppress(QzError):
            self._close_files()
            partial = self._partial
            begun = {place for name in self._journal.pieces for place in (name, name + TEMPORARY)}
            if (keep := self._journal.finished.keys() | begun) and partial is not None:
                if self._parent.is_same(self._name + PARTIAL, partial.descriptor):
                    sweep(partial, keep)
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
