"""An open folder on disk: what is done in it is done there, whatever its path leads to by now, and links stay links."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from qz import OutputRefused, QzError
from qz.formats.output.storage.disk import NOT_SUPPORTED, Disk

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["file", "folder", "link", "other"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO would wait for its other end forever.
_FILE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


class Directory:
    """An open folder. Names are relative to it, with slashes; on the way to them no link is followed either.

    A context manager that closes it. ``path`` is where it was, for messages.
    """

    def __init__(self, disk: Disk, descriptor: int, path: Path) -> None:
        self.disk, self.descriptor, self.path = disk, descriptor, path

    @classmethod
    def at(cls, disk: Disk, path: Path) -> Self:
        """The folder that the user named, where links may lead to it."""
        with disk.operation("open", path):
            return cls(disk, os.open(path, _FOLDER), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @contextmanager
    def _holding(self, name: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the folder that holds ``name``, and its name there."""
        *parents, base = name.split("/")
        descriptor = self.descriptor
        try:
            for parent in parents:
                inner = os.open(parent, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                if descriptor != self.descriptor:
                    os.close(descriptor)
                descriptor = inner
            yield descriptor, base
        finally:
            if descriptor != self.descriptor:
                os.close(descriptor)

    # Looking

    def status(self, name: str) -> os.stat_result | None:
        """The status of what is there, links not followed; None if there is nothing."""
        with self.disk.operation("stat", self.path / name):
            try:
                with self._holding(name) as (folder, base):
                    return os.stat(base, dir_fd=folder, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return None

    def kind(self, name: str) -> Kind | None:
        found = self.status(name)
        if found is None:
            return None
        kinds: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
        return kinds.get(stat.S_IFMT(found.st_mode), "other")

    def names(self, folder: str = "") -> list[str]:
        """What it, or a folder in it, holds, sorted."""
        if folder:
            with self.enter(folder) as inner:
                return inner.names()
        with self.disk.operation("list", self.path):
            return sorted(os.listdir(self.descriptor))

    def is_same(self, name: str, descriptor: int) -> bool:
        """Whether the open file or folder is the one under this name."""
        found = self.status(name)
        return found is not None and os.path.samestat(found, os.fstat(descriptor))

    def is_at_its_path(self) -> bool:
        """Whether its path still leads to it."""
        with self.disk.operation("stat", self.path):
            try:
                return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
            except (FileNotFoundError, NotADirectoryError):
                return False

    # Files

    def create(self, name: str) -> int:
        """A new file, for reading and writing; its mode is the umask's. OutputRefused if there is anything already."""
        return self._opened(name, os.O_CREAT | os.O_EXCL)

    def open(self, name: str) -> int:
        """A regular file that has this one name, for reading and writing."""
        return self._opened(name, 0)

    def open_or_create(self, name: str) -> tuple[int, bool]:
        """``open``, made if there is nothing; and whether it was."""
        try:
            return self.create(name), True
        except OutputRefused as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
        return self._opened(name, os.O_CREAT), False

    def open_existing(self, name: str) -> int | None:
        """``open``, or None if there is nothing."""
        return None if self.status(name) is None else self._opened(name, 0)

    def _opened(self, name: str, flags: int) -> int:
        path = self.path / name
        with self.disk.operation("open", path), self._holding(name) as (folder, base):
            descriptor = os.open(base, _FILE | flags, 0o666, dir_fd=folder)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
        what = "has another name as well (a hard link)" if stat.S_ISREG(found.st_mode) else "is not a file"
        raise OutputRefused(f"{path} {what}, so qz does not write to it. Move it away.")

    # Names

    def enter(self, name: str) -> Directory:
        """A folder in it, to be closed by the caller."""
        with self.disk.operation("open", self.path / name), self._holding(name) as (folder, base):
            return Directory(self.disk, os.open(base, _FOLDER | os.O_NOFOLLOW, dir_fd=folder), self.path / name)

    def make(self, name: str) -> None:
        """A new folder. OutputRefused if there is anything already."""
        with self.disk.operation("mkdir", self.path / name), self._holding(name) as (folder, base):
            os.mkdir(base, dir_fd=folder)

    def make_parents(self, name: str) -> None:
        """The folders on the way to ``name``, durably, unless they are there."""
        parts = name.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            parent = "/".join(parts[:depth])
            if self.kind(parent) != "folder":
                try:
                    self.make(parent)
                except OutputRefused:  # another thread was first
                    if self.kind(parent) != "folder":
                        raise
            self.sync("/".join(parts[: depth - 1]))

    def rename(self, old: str, new: str) -> None:
        with (
            self.disk.operation("rename", self.path / new),
            self._holding(old) as (old_folder, old_base),
            self._holding(new) as (new_folder, new_base),
        ):
            os.rename(old_base, new_base, src_dir_fd=old_folder, dst_dir_fd=new_folder)

    def take(self, other: Directory, name: str) -> None:
        """Move ``name`` here from another folder of the same file system, durably."""
        with (
            self.disk.operation("rename", self.path / name),
            other._holding(name) as (old_folder, base),
            self._holding(name) as (new_folder, _),
        ):
            os.rename(base, base, src_dir_fd=old_folder, dst_dir_fd=new_folder)
        parent = name.rpartition("/")[0]
        self.sync(parent)
        other.sync(parent)

    def sync(self, folder: str = "") -> None:
        """Wait until the names in it, or in a folder in it, are stored; nothing where there is no such operation."""
        if not self.disk.durable:
            return
        with self.disk.operation("fsync", self.path / folder):
            descriptor = self.descriptor
            if folder:
                with self._holding(folder) as (parent, base):
                    descriptor = os.open(base, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in NOT_SUPPORTED:
                    raise
            finally:
                if folder:
                    os.close(descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all it holds, however deep. Links are removed. Nothing there is fine."""
        what = self.kind(name)
        if what == "folder":
            with self.enter(name) as folder:
                folder._clear()
            self.remove_empty(name)
        elif what is not None:
            self._unlink(name)

    def _clear(self) -> None:
        """Folders in folders are moved up before they are emptied, so that no depth needs a stack or a descriptor."""
        while names := self.names():
            for name in names:
                if self.kind(name) != "folder":
                    self._unlink(name)
                    continue
                with self.enter(name) as folder:
                    folder._hand_over(self)
                self.remove_empty(name)

    def _hand_over(self, above: Directory) -> None:
        """Remove the files that it holds, and move its folders up."""
        for name in self.names():
            if self.kind(name) != "folder":
                self._unlink(name)
                continue
            try:
                self.remove_empty(name)
            except OutputRefused as error:
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _NOT_EMPTY:
                    raise
                new = f"{name[:20]}-{secrets.token_hex(8)}"
                with self.disk.operation("rename", above.path / new):
                    os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=above.descriptor)

    def discard(self, name: str, descriptor: int) -> None:
        """Remove the open file, if it is still under this name, as far as that works: something else has failed."""
        with suppress(QzError):
            if self.is_same(name, descriptor):
                self._unlink(name)

    def _unlink(self, name: str) -> None:
        with self.disk.operation("unlink", self.path / name), self._holding(name) as (folder, base):
            os.unlink(base, dir_fd=folder)

    def remove_empty(self, name: str) -> None:
        """Remove a folder that holds nothing; OutputRefused if it does."""
        with self.disk.operation("rmdir", self.path / name), self._holding(name) as (folder, base):
            os.rmdir(base, dir_fd=folder)


_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}
