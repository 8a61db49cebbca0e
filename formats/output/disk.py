"""Every file-system operation of the writer, each behind one hook, its errors turned into what the user can act on.

Nothing else that writes a checkpoint calls ``os``: a test that gives ``Disk`` a hook can fail or kill any operation.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from qz import IOFailed, OutputRefused, PermissionRefused, QzError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Kind = Literal["file", "folder", "link", "other"]


def _c_function(*names: str) -> Any:
    """The first of these functions that the C library has, or None. Calls release the GIL and set ``get_errno``."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    return next((getattr(libc, name) for name in names if hasattr(libc, name)), None)


# os.posix_fallocate would do, but where the file system has no fallocate, glibc imitates it with one write per 4 KiB.
_fallocate = _c_function("fallocate64", "fallocate")
_sync_file_range = _c_function("sync_file_range")
_SYNC_FILE_RANGE_WRITE = 2
_asking = threading.Lock()
_NOT_HERE = {errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY}
_NOT_HERE |= {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # a file system without locks
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def failure(error: OSError, operation: str, path: Path, needed: int = 0) -> QzError:
    """What to tell the user about an operation that failed. ``needed``: bytes that it asked for."""
    why = error.strerror or str(error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return IOFailed(
            f"{why}: {path} needs {needed:,} bytes, {_free_near(path):,} are free. "
            "Free some space, then run the same command again: it continues where it stopped."
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return PermissionRefused(
            f"{why}: cannot {operation} {path}. Change its permissions, or write elsewhere with -o/--output."
        )
    if error.errno in _NOT_HERE:
        return OutputRefused(f"{why}: cannot {operation} {path}. Write elsewhere with -o/--output.")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return IOFailed(f"{why}: cannot {operation} {path}. Raise the limit (ulimit -n), then run again to continue.")
    return IOFailed(
        f"{why}: cannot {operation} {path}. If the disk is sound, run the same command again: "
        "it continues where it stopped."
    )


def _free_near(path: Path) -> int:
    for folder in (path, *path.parents):
        try:
            return _free(folder)
        except OSError:
            continue
    return 0


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


Hook = Callable[[str, str], None]


def _no_hook(operation: str, path: str) -> None:
    pass


@dataclass(frozen=True)
class Disk:
    """How a run uses the disk: the value through which it performs every operation on files."""

    durable: bool = True
    """Whether ``sync`` and ``sync_folder`` wait for the disk; not with ``--no-fsync``."""
    hook: Hook = _no_hook
    """Called with the name of each operation and its path, before the operation."""

    @contextmanager
    def _operation(self, name: str, path: Path, needed: int = 0) -> Iterator[None]:
        try:
            self.hook(name, str(path))
            yield
        except OSError as error:
            raise failure(error, name, path, needed) from error

    def probe(self, path: Path) -> None:
        """Raise what making a file at ``path`` would raise, and leave none."""
        folder = path.parent
        with self._operation("open", path):
            if hasattr(os, "O_TMPFILE"):
                try:
                    os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC))
                    return
                except OSError as error:
                    if error.errno not in _NOT_SUPPORTED | {errno.EISDIR}:
                        raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
            os.unlink(path)

    def free_bytes(self, folder: Path) -> int:
        with self._operation("statvfs", folder):
            return _free(folder)

    def status(self, path: Path) -> os.stat_result | None:
        """``lstat``, or None if there is nothing."""
        with self._operation("stat", path):
            try:
                return os.lstat(path)
            except FileNotFoundError:
                return None

    def kind(self, path: Path) -> Kind | None:
        """What lies at ``path``, links not followed; None if nothing."""
        found = self.status(path)
        if found is None:
            return None
        for answer, test in ((("file"), stat.S_ISREG), ("folder", stat.S_ISDIR), ("link", stat.S_ISLNK)):
            if test(found.st_mode):
                return answer  # type: ignore[return-value]
        return "other"

    def names(self, folder: Path) -> list[str]:
        """What a folder holds, sorted."""
        with self._operation("list", folder):
            return sorted(os.listdir(folder))

    def open_file(self, path: Path, *, create: bool) -> int:
        """Open a regular file for reading and writing; its mode is the umask's. Links at the end are not followed."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        with self._operation("open", path):
            return os.open(path, flags | os.O_CREAT if create else flags, 0o666)

    def open_existing(self, path: Path) -> int | None:
        """``open_file``, or None if there is no such file."""
        with self._operation("open", path):
            try:
                return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None

    def close(self, descriptor: int, path: Path) -> None:
        """Close it, whatever happens: a descriptor kept open could keep the lock."""
        try:
            with self._operation("close", path):
                pass
        finally:
            os.close(descriptor)

    def try_lock(self, descriptor: int, path: Path) -> bool:
        """Take the lock that the kernel releases when this process ends; False if another one holds it."""
        with self._operation("lock", path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def same_file(self, descriptor: int, path: Path) -> bool:
        """Whether the open file still is the one at ``path``."""
        found = self.status(path)
        return found is not None and os.path.samestat(found, os.fstat(descriptor))

    def reserve(self, descriptor: int, path: Path, size: int) -> None:
        """Make the file ``size`` bytes long and, where the file system can, sure of its space on disk."""
        with self._operation("reserve", path, size):
            if size and _fallocate is not None:
                if _fallocate(ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
                    return
                code = ctypes.get_errno()
                if code not in _NOT_SUPPORTED:
                    raise OSError(code, os.strerror(code))
            os.ftruncate(descriptor, size)

    def write(self, descriptor: int, path: Path, data: memoryview, offset: int) -> None:
        """Write all of ``data`` (bytes) at ``offset``."""
        with self._operation("write", path, len(data)):
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)

    def start_writeback(self, descriptor: int, start: int, stop: int, *, wait: bool = False) -> None:
        """Ask the kernel to begin storing these bytes, so that the fsync at the end finds little left to do.

        Asking waits where the disk is slower than the run. So one thread at a time asks, which keeps the disk busy, and
        the others go on, unless they are to ``wait``: what they leave out is stored later.
        """
        if not self.durable or _sync_file_range is None or stop <= start or not _asking.acquire(blocking=wait):
            return
        try:
            _sync_file_range(
                ctypes.c_int(descriptor),
                ctypes.c_int64(start),
                ctypes.c_int64(stop - start),
                ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
            )
        finally:
            _asking.release()

    def read(self, descriptor: int, path: Path, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset``; the number of bytes there were."""
        with self._operation("read", path):
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return done

    def size(self, descriptor: int, path: Path) -> int:
        with self._operation("stat", path):
            return os.fstat(descriptor).st_size

    def truncate(self, descriptor: int, path: Path, size: int) -> None:
        with self._operation("truncate", path):
            os.ftruncate(descriptor, size)

    def sync(self, descriptor: int, path: Path) -> None:
        """Wait until the disk has stored the file, if the run is to be ``durable``."""
        if not self.durable:
            return
        with self._operation("fsync", path):
            os.fsync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """The same for the names in a folder; nothing where the file system has no such operation."""
        if not self.durable:
            return
        with self._operation("fsync", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
            finally:
                os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        with self._operation("rename", new):
            os.rename(old, new)

    def make_folder(self, path: Path) -> list[Path]:
        """Make a folder and those above it, unless they exist. Those that were made, the innermost first."""
        with self._operation("mkdir", path):
            missing = list(takewhile(lambda each: not os.path.lexists(each), (path, *path.parents)))
            os.makedirs(path, exist_ok=True)
            return missing

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all it holds. Links are removed, never followed. Nothing there is fine."""
        what = self.kind(path)
        if what == "folder":
            for name in self.names(path):
                self.remove(path / name)
            with self._operation("rmdir", path):
                os.rmdir(path)
        elif what is not None:
            with self._operation("unlink", path):
                os.unlink(path)
