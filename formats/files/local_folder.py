"""A folder on this machine, read by offset; of its links only those that are safe to follow count."""

from __future__ import annotations

import errno
import os
import stat
import threading
import weakref
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qz import IOFailed, MissingInput, PermissionRefused, QzError
from qz.formats.files.links import cache_blobs, is_downloaded, is_shared_component, is_shared_file
from qz.formats.malformed import Malformed, quoted
from qz.open_files import remedy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from qz.formats.files.folder import Range
    from qz.formats.files.promised import Promised

MAX_OPEN = 16
"""Files of one folder that stay open while none of them is read."""


class LocalFolder:
    """A folder on disk. At most ``MAX_OPEN`` files stay open; every one is read by offset, never mapped.

    Only regular files whose real path lies inside the folder count, so a link cannot name a file elsewhere; in a
    snapshot of the Hub's cache, links into that cache's blobs count too. ``shared_links``: the user named this folder,
    so links that its owner made to share weights, configs or components count, unless it was downloaded (see
    ``qz.formats.files.links``). Raises MissingInput, MalformedInput (not a folder) or PermissionRefused.
    """

    allow_pickle = False
    named_file: str | None = None
    only: str | None = None
    promised: Promised | None = None

    def __init__(self, path: Path, *, shared_links: bool = False, _roots: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        self.location = str(path)
        self._real = os.path.realpath(self.path)
        self._roots = _roots or (self._real, *cache_blobs(self._real))
        self._shared_links = shared_links and not is_downloaded(self._real)
        self._sizes: dict[str, int] | None = None
        self._folders: tuple[str, ...] = ()
        self._linked: list[str] = []
        self._open: OrderedDict[str, _Open] = OrderedDict()
        weakref.finalize(self, _close_all, self._open)  # descriptors are plain numbers, which nothing else closes
        self._marks: dict[str, _Mark] = {}
        self._read: set[str] = set()
        self._lock = threading.RLock()  # an interrupted thread that has it must still be able to close the folder
        try:
            mode = os.stat(self._real).st_mode
        except OSError as error:
            raise _failure(error, self.location, "opened") from None
        if not stat.S_ISDIR(mode):
            raise Malformed(
                "not-a-folder", f"{self.location} is not a folder. Name the folder that holds its config.json."
            )

    def sizes(self) -> Mapping[str, int]:
        if self._sizes is None:
            self._list()
        sizes = self._sizes or {}
        return MappingProxyType(sizes if self.only is None else {k: sizes[k] for k in (self.only,) if k in sizes})

    def include(self, name: str, files: Iterable[str]) -> None:
        inner = self.subfolder(name)
        sizes, _ = inner.sizes(), self.sizes()
        assert self._sizes is not None
        for file in files:
            if file in sizes:
                self._sizes[f"{name}/{file}"], self._marks[f"{name}/{file}"] = sizes[file], inner._marks[file]

    def subfolders(self) -> Sequence[str]:
        if self._sizes is None:
            self._list()
        return self._folders if self.only is None else ()

    def places(self) -> Iterator[Path]:
        """This folder, and the files and folders elsewhere that it holds by links, in its own folders too.

        Of a folder in which the user named a file, that file alone.
        """
        if (named := self.named_file or self.only) is not None:
            yield self.path / named
            return
        yield self.path
        self.sizes()
        yield from map(Path, self._linked)
        for name in self.subfolders() if self._shared_links else ():
            inner = self.subfolder(name)
            inner.sizes()
            yield from map(Path, inner._linked)

    def _list(self) -> None:
        try:
            with os.scandir(self._real) as entries:
                found = {entry.name: status for entry in entries if (status := self._status(entry)) is not None}
        except OSError as error:
            raise _failure(error, self.location, "listed") from None
        names = sorted(found)
        self._folders = tuple(name for name in names if stat.S_ISDIR(found[name].st_mode))
        files = [name for name in names if stat.S_ISREG(found[name].st_mode)]
        self._marks |= {name: _mark(found[name]) for name in files}
        self._sizes = {name: found[name].st_size for name in files}

    def _status(self, entry: os.DirEntry[str]) -> os.stat_result | None:
        """Of what an entry is or leads to; None where that does not count."""
        try:
            if entry.is_symlink() and not self._may_follow(entry.path):
                return None
            found = entry.stat()
            if entry.is_symlink() and not self._inside(entry.path):
                self._linked.append(os.path.realpath(entry.path))
        except OSError:  # a broken link, a loop: reading it by name says what is wrong
            return None
        return found

    def _inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return any(real.startswith(root.rstrip("/") + "/") for root in self._roots)

    def _may_follow(self, link: str) -> bool:
        """Whether what a link leads to counts as a file or folder of this one."""
        return self._inside(link) or (self._shared_links and (is_shared_file(link) or is_shared_component(link)))

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        if self.promised is not None:
            self.promised.require_before(file, self.sizes().get(file), self.location, self._read_into)
        self._read_into(file, offset, buffer)

    def _read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        where = os.path.join(self.location, file)
        with self._descriptor(file, where) as descriptor:
            view = buffer.cast("B")
            done = 0
            while done < len(view):
                try:
                    count = os.preadv(descriptor, [view[done:]], offset + done)
                except OSError as error:
                    raise _failure(error, where, "read") from None
                if count == 0:
                    self._require_unchanged(file)
                    raise Malformed(
                        "truncated",
                        f"{where} ends at byte {offset + done}, before byte {offset + len(view)}: it is "
                        "truncated. Download it again.",
                    )
                done += count

    @contextmanager
    def _descriptor(self, file: str, where: str) -> Iterator[int]:
        """The open descriptor of ``file``, which is not closed while it is in use."""
        with self._lock:
            opened = self._open.get(file)
            if opened is None:
                opened = self._open[file] = _Open(self._opened(file, where))
            self._open.move_to_end(file)
            opened.users += 1
            idle = [name for name, held in self._open.items() if not held.users]
            for name in idle[: max(0, len(self._open) - MAX_OPEN)]:
                os.close(self._open.pop(name).descriptor)
        try:
            yield opened.descriptor
        finally:
            with self._lock:
                opened.users -= 1

    def _opened(self, file: str, where: str) -> int:
        if file in ("", ".", "..") or ("/" in file and file not in self.sizes()) or "\0" in file:
            raise Malformed("unsafe-name", f"{quoted(file)} is not a plain file name inside {self.location}.")
        path = os.path.join(self._real, file)
        try:
            if os.path.islink(path):
                os.stat(path)  # a loop or a dangling link fails here, with its own error
                if not self._may_follow(path):
                    raise Malformed(
                        "link-outside",
                        f"{where} is a link that leads out of the folder, to {os.path.realpath(path)}. "
                        "Put the file itself there.",
                    )
            # Without O_NONBLOCK, opening a FIFO would wait for a writer forever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise _failure(error, where, "opened") from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise Malformed("not-a-file", f"{where} is {_kind(found.st_mode)}, not a file.")
        if self._marks.setdefault(file, _mark(found)) != _mark(found):
            os.close(descriptor)
            raise _changed(where)
        self._read.add(file)
        return descriptor

    def announce(self, ranges: Sequence[Range]) -> None:
        """The kernel reads ahead by itself."""
        if self.promised is not None:
            self.promised.begin(dict.fromkeys(each.file for each in ranges), self._read_into)

    def is_verified(self, file: str) -> bool:
        self._require_unchanged(file)
        return self.promised is None or self.promised.is_right(file, self.location, self._read_into)

    def _require_unchanged(self, file: str) -> None:
        where = os.path.join(self.location, file)
        try:
            found = os.stat(os.path.join(self._real, file))
        except FileNotFoundError:
            raise MissingInput(f"{where} disappeared while it was read. Run again once it is back.") from None
        except OSError as error:
            raise _failure(error, where, "looked up") from None
        if _mark(found) != self._marks.get(file, _mark(found)):
            raise _changed(where)

    def check(self) -> None:
        files = sorted(self._read)
        if self.promised is not None:
            self.promised.begin(files, self._read_into)
            for file in files:
                self.promised.require(file, self.location, self._read_into)
        for file in files:
            self._require_unchanged(file)

    def identity(self) -> dict[str, Any]:
        return {"folder": self._real, "files": {name: list(self.stamp(name)) for name in self.opened()}}

    def opened(self) -> Sequence[str]:
        """Files that were read so far."""
        return sorted(self._read)

    def stamp(self, file: str) -> tuple[int, int]:
        """Size, and time of the last change in nanoseconds, of a file as it was when it was first seen."""
        self.sizes()
        return self._marks[file][2:]

    def subfolder(self, name: str) -> LocalFolder:
        path = os.path.join(self._real, name)
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts) or (
            os.path.isdir(path) and not (self._inside(path) or self._is_shared(path))
        ):
            leads = f": it is a link to {os.path.realpath(path)}" if os.path.islink(path) else ""
            raise Malformed("unsafe-name", f"{quoted(name)} is not a folder inside {self.location}{leads}.")
        if not os.path.isdir(path):
            there = ", ".join(self.subfolders()) or "none"
            raise MissingInput(f"{self.location} has no folder {quoted(name)}. Folders there: {there}.")
        inner = LocalFolder(
            Path(path),
            shared_links=self._shared_links,
            _roots=self._roots if self._inside(path) else (),
        )
        inner.path, inner.location = self.path / name, os.path.join(self.location, name)
        inner.allow_pickle = self.allow_pickle
        inner.promised = self.promised.inside(name) if self.promised is not None else None
        return inner

    def _is_shared(self, path: str) -> bool:
        return self._shared_links and os.path.islink(path) and is_shared_component(path)

    def give_up(self) -> None:
        """Reads of a disk end by themselves."""
        if self.promised is not None:
            self.promised.stop()

    def close(self) -> None:
        self.give_up()
        with self._lock:
            _close_all(self._open)


_Mark = tuple[int, int, int, int]


@dataclass(slots=True)
class _Open:
    descriptor: int
    users: int = 0


def _close_all(opened: OrderedDict[str, _Open]) -> None:
    while opened:
        os.close(opened.popitem()[1].descriptor)


def _mark(found: os.stat_result) -> _Mark:
    """What stays the same as long as a file does: device, inode, size, time of change in nanoseconds."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")


def _changed(where: str) -> Malformed:
    return Malformed("changed", f"{where} changed while it was read. Retry when the file is no longer being modified.")


def _failure(error: OSError, where: str, act: str) -> QzError:
    """The error of the package that says what the system's one means."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return MissingInput(f"{where} does not exist. Check the path and, if it is a link, where it leads.")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionRefused(f"{where} cannot be {act}: no permission. Check its owner and mode.")
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL):
        why = (error.strerror or "invalid name").lower()
        mend = {errno.ELOOP: "Replace it with what it should lead to.", errno.ENAMETOOLONG: "Give it a shorter name."}
        return Malformed("unreadable", f"{where} cannot be {act}: {why}. {mend.get(error.errno, 'Check the path.')}")
    why = (error.strerror or str(error)).lower()
    return IOFailed(f"{where} cannot be {act}: {why}. {remedy(error, 'Check the disk, or copy the file again.')}")
