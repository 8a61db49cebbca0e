"""Fetch files ahead of their readers in bounded memory, and hash each from its first byte to its last.

Files are cut into segments, which several threads fetch in order into a fixed number of buffers. A buffer is free
again when its segment was hashed and everything announced in it was read. Readers need not keep the order: segments
that nobody reads while all readers wait for later ones are given up after a while, and fetched once more if they are
wanted after all. What is read twice is compared with what was hashed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from qz import TryAgain
from qz.formats.hub.transport.remote_file import differs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qz.formats.malformed import Malformed

MIB = 1 << 20
AGAIN = 4
"""Segments that are kept after they were fetched once more."""


class Hasher(Protocol):
    """What hashlib makes."""

    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> Hasher: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """``window``: bytes of all buffers; ``narrow``: the same while something else needs memory. ``patience``: seconds
    of standstill before unread segments are given up."""

    segment: int = 8 * MIB
    window: int = 96 * MIB
    narrow: int = 32 * MIB
    connections: int = 8
    patience: float = 1.0


@dataclass(frozen=True, slots=True)
class HashedRange:
    """Bytes ``[start, stop)`` that were read before the file was fetched whole, and their SHA-256."""

    start: int
    stop: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class AheadFile:
    """A file to fetch whole. ``hasher`` is new, ``digest`` hexadecimal. ``wanted``: the ranges that will be read."""

    name: str
    size: int
    hasher: Hasher
    digest: str
    wanted: Sequence[tuple[int, int]]
    seen: Sequence[HashedRange] = ()


class ReadAhead:
    """Streams ``files``, one after the other. ``fetch(name, start, view)`` fills ``view`` or raises; it is called from
    several threads at once. ``where`` names the files' place in messages. ``is_narrow``: whether something else
    needs memory now.
    """

    def __init__(
        self,
        files: Sequence[AheadFile],
        fetch: Callable[[str, int, memoryview], None],
        where: str,
        pace: Pace | None = None,
        is_narrow: Callable[[], bool] = bool,
    ) -> None:
        self._fetch, self._where, self._pace, self._is_narrow = fetch, where, pace or Pace(), is_narrow
        self._streams = {file.name: _Stream(file, self._pace.segment) for file in files}
        self._order = [segment for stream in self._streams.values() for segment in stream.segments]
        self._next = 0
        self._free: list[bytearray] = []
        self._made = 0
        self._length = max((segment.stop - segment.start for segment in self._order), default=0)
        self._held: set[_Segment] = set()
        self._fetching = 0
        self._moves = 0
        self._failure: BaseException | None = None  # nothing may be read any more
        self._broken: BaseException | None = None  # nothing more is fetched; what is there may be read
        self._closed = False
        self._again: list[_Segment] = []
        self._lock = threading.RLock()
        self._change = threading.Condition(self._lock)
        count = min(self._pace.connections, self._most, len(self._order))
        self._threads = [threading.Thread(target=self._work, name="qz-hub", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def _most(self) -> int:
        """How many buffers there may be now."""
        window = min(self._pace.window, self._pace.narrow) if self._is_narrow() else self._pace.window
        return max(1, window // self._pace.segment)

    def __contains__(self, name: str) -> bool:
        return name in self._streams

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; waits for the bytes. The range must lie inside the file."""
        stream, done = self._streams[name], 0
        while done < len(view):
            segment = stream.at(offset + done)
            start = offset + done - segment.start
            part = view[done : done + min(len(view) - done, segment.stop - segment.start - start)]
            if self._hold(segment):
                try:
                    part[:] = segment.view[start : start + len(part)]
                finally:
                    self._let_go(segment, segment.wanted_in(offset + done, offset + done + len(part)))
            else:
                part[:] = self._fetch_again(segment)[start : start + len(part)]
            done += len(part)

    def is_verified(self, name: str) -> bool:
        """Whether the whole file has arrived and has the promised hash."""
        with self._lock:
            return self._streams[name].done

    def finish(self) -> None:
        """Fetch what is left without keeping it, and raise MalformedInput if a file's hash is not the promised one."""
        with self._lock:
            for segment in self._order:
                segment.unread = 0
            for segment in list(self._held):
                self._release(segment)
            self._change.notify_all()
            while not (self._failure or self._broken or self._closed or all(s.done for s in self._streams.values())):
                self._change.wait()
            self._raise()
            if self._broken is not None:
                raise self._broken

    def close(self) -> None:
        """Stop the threads; what still waits gets an error."""
        with self._lock:
            self._closed = True
            self._change.notify_all()
        deadline = time.monotonic() + 0.5  # one that waits for the network ends by its own timeout
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    # The readers

    def _hold(self, segment: _Segment) -> bool:
        """Wait until ``segment`` can be read, and keep it; False if its bytes were given up."""
        with self._lock:
            moves, since = self._moves, time.monotonic()
            while segment.state in (_State.WAITING, _State.FETCHING):
                self._raise()
                if self._broken is not None and (segment.failed or segment.state is _State.WAITING):
                    raise self._broken
                if self._closed:
                    raise TryAgain(f"Reading {self._where} was stopped.")
                self._change.wait(self._pace.patience)
                if moves != self._moves or self._fetching:
                    moves, since = self._moves, time.monotonic()
                elif time.monotonic() - since >= self._pace.patience:
                    self._give_up()
            if segment.state is _State.GONE:
                return False
            self._raise()
            segment.readers += 1
            return True

    def _let_go(self, segment: _Segment, length: int) -> None:
        with self._lock:
            segment.readers -= 1
            segment.unread -= length
            self._moves += 1
            self._release(segment)

    def _give_up(self) -> None:
        """All readers wait for segments without a buffer: free the buffers that none is reading."""
        for segment in list(self._held):
            if segment.hashed and not segment.readers:
                segment.unread = 0
                self._release(segment)

    def _fetch_again(self, segment: _Segment) -> memoryview:
        """The bytes of a segment that was given up, or is read a second time; compared with what was hashed."""
        with segment.again:  # one thread fetches for all that want it
            with self._lock:
                for kept in self._again:
                    if kept.stream is segment.stream and kept.number == segment.number:
                        return kept.view
            copy = _Segment(segment.stream, segment.number, segment.start, segment.stop)
            copy.buffer = bytearray(segment.stop - segment.start)
            self._fetch(segment.stream.file.name, segment.start, copy.view)
            if not segment.stream.same(copy):
                raise self._differs(segment.stream)
            with self._lock:
                self._again = [*self._again[1 - AGAIN :], copy]  # neighbours are often read next
            return copy.view

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    # The fetching threads

    def _work(self) -> None:
        while (segment := self._take()) is not None:
            try:
                self._fetch(segment.stream.file.name, segment.start, segment.view)
            except BaseException as error:  # noqa: BLE001 - it is raised in the readers that get that far
                with self._lock:
                    self._broken = self._broken or error
                    segment.failed = True
                    self._fetching -= 1
                    self._change.notify_all()
                return
            with self._lock:
                segment.state = _State.READY
                self._fetching -= 1
                self._moves += 1
                self._change.notify_all()
            try:
                self._hash(segment.stream)
            except BaseException as error:  # noqa: BLE001 - it is raised in every reader
                with self._lock:
                    self._failure = self._failure or error
                    self._change.notify_all()
                return

    def _take(self) -> _Segment | None:
        """The next segment, with a buffer; None when there is nothing left to do."""
        with self._lock:
            while True:
                if self._closed or self._failure or self._broken or self._next >= len(self._order):
                    return None
                if self._made - len(self._free) < self._most:
                    break
                self._change.wait()
            segment = self._order[self._next]
            self._next += 1
            if self._free:
                segment.buffer = self._free.pop()
            else:
                self._made += 1
                segment.buffer = bytearray(self._length)
            segment.state = _State.FETCHING
            self._fetching += 1
            self._held.add(segment)
            return segment

    def _release(self, segment: _Segment) -> None:
        """Free the buffer if no reader needs it. The lock is held."""
        if segment.state is _State.READY and segment.hashed and segment.unread <= 0 and not segment.readers:
            segment.state = _State.GONE
            self._held.discard(segment)
            if self._made > self._most:
                self._made -= 1
            else:
                self._free.append(segment.buffer)
            segment.buffer = bytearray()
            self._moves += 1
            self._change.notify_all()

    def _hash(self, stream: _Stream) -> None:
        """Hash as far as the segments of ``stream`` are there, unless another thread is at it."""
        while True:
            with self._lock:
                segment = stream.next_to_hash()
                if stream.hashing or segment is None:
                    return
                stream.hashing = True
            same = stream.update(segment)  # the slow part, without the lock
            with self._lock:
                stream.hashing = False
                segment.hashed = True
                stream.hashed += 1
                if not same or (stream.complete and stream.hasher.hexdigest() != stream.file.digest):
                    raise self._differs(stream)
                stream.done = stream.complete
                self._release(segment)
                self._change.notify_all()

    def _differs(self, stream: _Stream) -> Malformed:
        return differs(f"{self._where}/{stream.file.name}", stream.file.digest)


class _State(Enum):
    WAITING = auto()
    FETCHING = auto()
    READY = auto()
    GONE = auto()


@dataclass(slots=True, eq=False)
class _Segment:
    """``wanted``: announced ranges in it, in order. ``unread``: how many of their bytes were not read yet."""

    stream: _Stream
    number: int
    start: int
    stop: int
    wanted: list[tuple[int, int]] = field(default_factory=list)
    unread: int = 0
    state: _State = _State.WAITING
    hashed: bool = False
    failed: bool = False
    readers: int = 0
    buffer: bytearray = field(default_factory=bytearray)
    again: threading.Lock = field(default_factory=threading.Lock)

    def wanted_in(self, start: int, stop: int) -> int:
        """How many announced bytes lie in ``[start, stop)``."""
        return sum(max(0, min(stop, last) - max(start, first)) for first, last in self.wanted)

    @property
    def view(self) -> memoryview:
        return memoryview(self.buffer)[: self.stop - self.start]


class _Stream:
    """One file, its segments, and how far it is hashed. ``states[n]``: the hash before segment n."""

    def __init__(self, file: AheadFile, size: int) -> None:
        self.file, self.hasher, self.size = file, file.hasher, size
        self.segments = [
            _Segment(self, number, start, min(start + size, file.size))
            for number, start in enumerate(range(0, file.size, size))
        ]
        for start, stop in _merged(file.wanted):
            for segment in self.segments[start // size : -(-stop // size)]:
                segment.wanted.append((max(start, segment.start), min(stop, segment.stop)))
                segment.unread += segment.wanted[-1][1] - segment.wanted[-1][0]
        self.states: list[Hasher] = [self.hasher.copy()]
        self.seen = [(seen, hashlib.sha256()) for seen in file.seen]
        self.hashed, self.hashing, self.done = 0, False, not self.segments

    def at(self, offset: int) -> _Segment:
        return self.segments[offset // self.size]

    @property
    def complete(self) -> bool:
        return self.hashed == len(self.segments)

    def next_to_hash(self) -> _Segment | None:
        if self.complete or self.segments[self.hashed].state is not _State.READY:
            return None
        return self.segments[self.hashed]

    def update(self, segment: _Segment) -> bool:
        """Hash one segment; False if bytes that were seen before differ now."""
        view, same = segment.view, True
        self.hasher.update(view)
        self.states.append(self.hasher.copy())
        for seen, hasher in self.seen:
            start, stop = max(seen.start, segment.start), min(seen.stop, segment.stop)
            if start < stop:
                hasher.update(view[start - segment.start : stop - segment.start])
                same = same and (stop < seen.stop or hasher.digest() == seen.sha256)
        return same

    def same(self, segment: _Segment) -> bool:
        """Whether the bytes of ``segment`` are those that were hashed at its place."""
        hasher = self.states[segment.number].copy()
        hasher.update(segment.view)
        return hasher.digest() == self.states[segment.number + 1].digest()


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as ranges in order that do not overlap."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return merged
