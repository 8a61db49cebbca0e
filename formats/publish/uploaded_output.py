"""An output in the making that stays on no disk: each finished file is sent to the Hub, noted and hollowed out.

The staging area holds what is being written and what is on its way, a bounded number of shards at a time. Of what was
sent, the headers stay until the end, for the output is read before it is published.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from qz import QzError, TryAgain
from qz.formats.output.resuming.pending import IsVerified
from qz.formats.output.shards.sparse import make_sparse
from qz.formats.output.staging import Staging
from qz.formats.publish.destination import UploadsLost
from qz.formats.publish.verified_file import VerifiedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from qz.formats.output.recorded.record import WrittenFile
    from qz.formats.output.resuming.earlier_run import Resumable
    from qz.formats.output.shards.pieces import Piece
    from qz.formats.output.shards.shard_layout import ShardLayout
    from qz.formats.output.shards.shard_writer import ShardWriter
    from qz.formats.output.storage.disk import Disk
    from qz.formats.publish.destination import PushResult
    from qz.formats.publish.publication import Publication


class UploadedOutput(Staging):
    """As ``Staging``, but after ``commit`` the output is in one commit on the Hub (``pushed``), and nothing is here."""

    pushed: PushResult
    replaces = False
    """Whether what lies in its place may be replaced."""

    def __init__(
        self,
        publication: Publication,
        output: Path,
        fingerprint: Mapping[str, Any],
        *,
        needed: int,
        order: Sequence[str],
        at_once: int,
        resume: bool = True,
        about: Mapping[str, Any] | None = None,
        disk: Disk | None = None,
        resumable: Resumable | None = None,
    ) -> None:
        """``order``: the shards as they are begun; ``at_once``: how many of them may be on this disk, at least as many
        as are open at a time when they are written in that order. ``output`` names the staging area, see ``Staging``.
        """
        self._publication = publication
        self._room = _Room(order, at_once)
        self._left_over: dict[str, WrittenFile] = {}
        super().__init__(
            output,
            fingerprint,
            needed=needed,
            overwrite=self.replaces,
            resume=resume,
            about=about,
            disk=disk,
            resumable=resumable,
        )

    def _prepare(self, fingerprint: dict[str, Any]) -> None:
        super()._prepare(fingerprint)
        self._left_over = {name: file for name, file in self.finished.items() if name not in self._journal.uploaded}
        self._room.skip(self.finished)
        self._room.admit(self.begun)

    def open_shard(self, layout: ShardLayout, is_verified: IsVerified = lambda: True) -> ShardWriter:
        self._send_left_over()
        return _LaterShard(self, layout, is_verified)  # type: ignore[return-value]  # has the methods that are used

    def read_staged(self, name: str, offset: int, buffer: memoryview) -> bool:
        return name not in self._journal.uploaded and super().read_staged(name, offset, buffer)

    def begin_shard(self, layout: ShardLayout, is_verified: IsVerified) -> ShardWriter:
        """Open a shard as soon as there is room for it."""
        self._room.enter(layout.file)
        return super().open_shard(layout, is_verified)

    def copy_file(
        self,
        name: str,
        size: int,
        read: Callable[[int, memoryview], None],
        progress: Callable[[int], None] | None = None,
        is_verified: IsVerified = lambda: True,
    ) -> WrittenFile:
        self._send_left_over()
        return super().copy_file(name, size, read, progress, is_verified)

    def give_up(self) -> None:
        self._room.close()
        self._publication.stop()

    def _send_left_over(self) -> None:
        """What an earlier run has finished and not sent."""
        while self._left_over:
            name = next(iter(self._left_over))
            self._send(self._left_over[name])
            del self._left_over[name]

    def _keep(self, file: WrittenFile, is_verified: IsVerified) -> None:
        """Note a finished file, send it, note that, and hollow it out: each step is durable before the next begins."""
        super()._keep(file, is_verified)
        self._send(file)
        self._room.leave(file.name)

    def _send(self, file: WrittenFile) -> None:
        self._publication.send(file.name, VerifiedFile.of(self._staged.path / file.name), file.sha256)
        self._journal.uploaded.add(file.name)
        if not self._pending.waits(file.name):
            self._journal.add(file)
        make_sparse(self._staged, file.name)

    def _require_space(self, needed: int) -> None:  # noqa: ARG002 - what was sent takes no space, but does not free any
        super()._require_space(self._needed)

    def _verify(self, file: WrittenFile) -> None:
        if file.name not in self._journal.uploaded:
            super()._verify(file)

    def _publish(self) -> None:
        """The one commit, then nothing is left here."""
        uploaded = {
            name: (file.bytes, file.sha256) for name, file in self._written.items() if name in self._journal.uploaded
        }
        here = {name: VerifiedFile.of(self._staged.path / name) for name in self._written if name not in uploaded}
        try:
            self.pushed = self._publication.publish(uploaded, here, self._about)
        except UploadsLost as lost:
            for name in lost.names:
                self._journal.forget(name)
            raise
        self._committed = True
        try:
            self._remove_partial()
            self._journal.remove()
        except QzError as error:
            raise type(error)(f"{self._publication.location} is complete, but cleaning up failed: {error}") from error
        finally:
            self._journal.close()


class _LaterShard:
    """A shard that is opened when the first byte of it is there."""

    def __init__(self, output: UploadedOutput, layout: ShardLayout, is_verified: IsVerified) -> None:
        self._output, self._layout, self._is_verified = output, layout, is_verified
        self._writer: ShardWriter | None = None
        self._opening = threading.Lock()

    def write(self, tensor: str, data: Any, offset: int = 0) -> None:
        self._opened().write(tensor, data, offset)

    def write_variable(self, tensor: str, data: bytes) -> None:
        self._opened().write_variable(tensor, data)

    def store(self, tensors: Collection[str]) -> Piece | None:
        return self._opened().store(tensors)

    def finish(self) -> WrittenFile:
        return self._opened().finish()

    def _opened(self) -> ShardWriter:
        if self._writer is None:
            with self._opening:
                if self._writer is None:
                    self._writer = self._output.begin_shard(self._layout, self._is_verified)
        return self._writer


class _Room:
    """Lets ``at_once`` shards in at a time, in ``order``: else those that came early could wait for each other."""

    def __init__(self, order: Sequence[str], at_once: int) -> None:
        self._waiting, self._at_once = list(order), at_once
        self._inside: set[str] = set()
        self._closed = False
        self._lock = threading.RLock()
        self._change = threading.Condition(self._lock)

    def skip(self, names: Collection[str]) -> None:
        self._waiting = [name for name in self._waiting if name not in names]

    def admit(self, names: Iterable[str]) -> None:
        """Admit files that are here already, whatever the order."""
        self._inside |= set(names)
        self.skip(self._inside)

    def enter(self, name: str) -> None:
        with self._lock:
            if name in self._inside:
                return
            self._change.wait_for(
                lambda: self._closed or (self._waiting[0] == name and len(self._inside) < self._at_once)
            )
            if self._closed:
                raise TryAgain("The upload was stopped.")
            self._inside.add(self._waiting.pop(0))
            self._change.notify_all()

    def leave(self, name: str) -> None:
        with self._lock:
            self._inside.discard(name)
            self._change.notify_all()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._change.notify_all()
