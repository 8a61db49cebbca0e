"""Every operation of the writer on an open file, each behind one hook, its errors turned into what the user can act on.

Names are looked up in an open ``Directory``. Nothing else that writes a checkpoint calls ``os``: a test that gives
``Disk`` a hook can fail or kill any operation.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from qz import IOFailed, OutputRefused, PermissionRefused, QzError
from qz.open_files import remedy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
_NOT_HERE |= {errno.EEXIST, errno.EISDIR}  # someone else uses a name that is qz's own
_NOT_HERE |= {errno.ENOSYS, errno.EOPNOTSUPP}
NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, *NOT_SUPPORTED}


def failure(error: OSError, operation: str, path: Path, needed: int = 0) -> QzError:
    """What to tell the user about an operation that failed. ``needed``: bytes that it asked for."""
    why = error.strerror or str(error)
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return IOFailed(
            f"{why}: {path} {_lacking(error, path, needed)}, then run the same command again: "
            "it continues where it stopped."
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return PermissionRefused(
            f"{why}: cannot {operation} {path}. Change its permissions, or write elsewhere with -o/--output."
        )
    if operation == "lock" and error.errno in _NO_LOCKS:
        return OutputRefused(
            f"{why}: the file system of {path.parent} has no locks, without which two runs could write one output. "
            "Write to a folder on another file system with -o/--output, and move the output when it is done."
        )
    if error.errno in _NOT_HERE:
        return OutputRefused(f"{why}: cannot {operation} {path}. Write elsewhere with -o/--output.")
    advice = remedy(error, "If the disk is sound, run the same command again: it continues where it stopped.")
    return IOFailed(f"{why}: cannot {operation} {path}. {advice}")


def _lacking(error: OSError, path: Path, needed: int) -> str:
    """What is lacking, and what to do."""
    found = _statvfs_near(path)
    if error.errno == errno.ENOSPC and found is not None and found.f_files and not found.f_favail:
        return "needs an inode, and the file system has none left. Delete some files, however small"
    free = found.f_bavail * found.f_frsize if found is not None else 0
    return f"needs {needed:,} bytes, {free:,} are free. Free some space"


def _statvfs_near(path: Path) -> os.statvfs_result | None:
    for folder in (path, *path.parents):
        try:
            return os.statvfs(folder)
        except OSError:
            continue
    return None


def _unnamed(folder: Path) -> int | None:
    """A new file in ``folder`` without a name, or None where the system or the file system has none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED | {errno.EISDIR}:
            raise
        return None


def _fallocated(descriptor: int, size: int) -> bool:
    """Whether the file system has such an operation; then it has worked."""
    if _fallocate is None:
        return False
    while _fallocate(ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in NOT_SUPPORTED:
            return False
        if code != errno.EINTR:  # interrupted by a signal: repeat it, as ``os`` does
            raise OSError(code, os.strerror(code))
    return True


def _is_in_memory(descriptor: int) -> bool:
    """Whether a file lies in memory, where to reserve space is to take it page by page, as slowly as it is written."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            mount, _, kind = line.partition(" - ")
            if mount.split(" ", 3)[2] == number:
                return kind.startswith(("tmpfs ", "ramfs "))
    return False


def _ask_to_store(descriptor: int, start: int, stop: int) -> None:
    """Called with ``_asking`` held, which it releases. A descriptor that is closed by then does no harm."""
    try:
        _sync_file_range(
            ctypes.c_int(descriptor),
            ctypes.c_int64(start),
            ctypes.c_int64(stop - start),
            ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
        )
    finally:
        _asking.release()


KEEP_EVERY = 256 << 20
KEEP_APART = 1.0
Hook = Callable[[str, str], None]


def _no_hook(operation: str, path: str) -> None:
    pass


@dataclass(frozen=True)
class Disk:
    """How a run uses the disk: the value through which it performs every operation on files."""

    durable: bool = True
    """Whether ``sync`` waits for the disk; not with ``--no-fsync``."""
    keep_every: int = KEEP_EVERY
    """After so many bytes of finished tensors of a shard they are stored and noted, so that a later run keeps them."""
    keep_apart: float = KEEP_APART
    """Seconds without that after each time, as all writers wait while the disk empties its cache and its journal."""
    hook: Hook = _no_hook
    """Called with the name of each operation and its path, before the operation."""

    @contextmanager
    def operation(self, name: str, path: Path, needed: int = 0) -> Iterator[None]:
        try:
            self.hook(name, str(path))
            yield
        except OSError as error:
            raise failure(error, name, path, needed) from error

    def probe(self, path: Path, operation: str = "open") -> None:
        """Raise what making ``path`` by ``operation``, or locking a file there, would raise; leave nothing behind."""
        with self.operation(operation, path):
            descriptor = _unnamed(path.parent)
            if descriptor is None:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
                os.unlink(path)
        try:
            self.try_lock(descriptor, path)
        finally:
            os.close(descriptor)

    def free_bytes(self, descriptor: int, path: Path) -> int:
        with self.operation("statvfs", path):
            found = os.fstatvfs(descriptor)
            return found.f_bavail * found.f_frsize

    def status(self, path: Path) -> os.stat_result | None:
        """``lstat``, or None if there is nothing."""
        with self.operation("stat", path):
            try:
                return os.lstat(path)
            except FileNotFoundError:
                return None

    def close(self, descriptor: int, path: Path) -> None:
        """Close it, whatever happens: a descriptor kept open could keep the lock."""
        try:
            with self.operation("close", path):
                pass
        finally:
            os.close(descriptor)

    def try_lock(self, descriptor: int, path: Path) -> bool:
        """Take the lock that the kernel releases when this process ends; False if another one holds it.

        OutputRefused where the file system has no locks.
        """
        with self.operation("lock", path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def reserve(self, descriptor: int, path: Path, size: int) -> None:
        """Make the file ``size`` bytes long and, where the file system can, sure of its space on disk."""
        with self.operation("reserve", path, size):
            if not size or _is_in_memory(descriptor) or not _fallocated(descriptor, size):
                os.ftruncate(descriptor, size)

    def write(self, descriptor: int, path: Path, data: memoryview, offset: int) -> None:
        """Write all of ``data`` (bytes) at ``offset``."""
        with self.operation("write", path, len(data)):
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)

    def start_writeback(self, descriptor: int, start: int, stop: int, *, wait: bool = False) -> None:
        """Ask the kernel to begin storing these bytes, so that the fsync at the end finds little left to do.

        Asking waits where the disk is slower than the run. So a thread of its own asks, one at a time, which keeps the
        disk busy, and what others would ask meanwhile is stored later; unless they are to ``wait``.
        """
        if not self.durable or _sync_file_range is None or stop <= start or not _asking.acquire(blocking=wait):
            return
        if wait:
            _ask_to_store(descriptor, start, stop)
            return
        try:
            threading.Thread(target=_ask_to_store, args=(descriptor, start, stop), daemon=True).start()
        except RuntimeError:  # no thread can be started: the fsync will do
            _asking.release()

    def read(self, descriptor: int, path: Path, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset``; the number of bytes there were."""
        with self.operation("read", path):
            done = 0
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return done

    def size(self, descriptor: int, path: Path) -> int:
        with self.operation("stat", path):
            return os.fstat(descriptor).st_size

    def truncate(self, descriptor: int, path: Path, size: int) -> None:
        with self.operation("truncate", path):
            os.ftruncate(descriptor, size)

    def sync(self, descriptor: int, path: Path) -> None:
        """Wait until the disk has stored the file, if the run is to be ``durable``."""
        if not self.durable:
            return
        with self.operation("fsync", path):
            os.fsync(descriptor)

    def make_folder(self, path: Path) -> list[Path]:
        """Make a folder and those above it, unless they exist. Those that were made, the innermost first."""
        with self.operation("mkdir", path):
            missing = list(takewhile(lambda each: not os.path.lexists(each), (path, *path.parents)))
            try:
                os.makedirs(path, exist_ok=True)
            except OSError:
                for each in missing:
                    with suppress(OSError):
                        os.rmdir(each)
                raise
            return missing

    def remove_empty(self, path: Path) -> None:
        """Remove a folder that holds nothing; OutputRefused if it does."""
        with self.operation("rmdir", path):
            os.rmdir(path)
