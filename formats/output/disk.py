"""Every file-system operation of the writer, each behind one hook, its errors turned into what the user can act on.

Nothing else that writes a checkpoint calls ``os``: a test that replaces ``hook`` can fail or kill any operation.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from qz import IOFailed, OutputRefused, PermissionRefused, QzError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Kind = Literal["file", "folder", "link", "other"]


def _no_hook(operation: str, path: str) -> None:
    pass


hook: Callable[[str, str], None] = _no_hook
"""Called with the name of each operation and its path, before the operation."""
durable = True
"""Whether ``sync`` and ``sync_folder`` wait for the disk. Cleared for a whole process, by ``--no-fsync``."""


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


@contextmanager
def _operation(name: str, path: Path, needed: int = 0) -> Iterator[None]:
    try:
        hook(name, str(path))
        yield
    except OSError as error:
        raise failure(error, name, path, needed) from error


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


def free_bytes(folder: Path) -> int:
    with _operation("statvfs", folder):
        return _free(folder)


def status(path: Path) -> os.stat_result | None:
    """``lstat``, or None if there is nothing."""
    with _operation("stat", path):
        try:
            return os.lstat(path)
        except FileNotFoundError:
            return None


def kind(path: Path) -> Kind | None:
    """What lies at ``path``, links not followed; None if nothing."""
    found = status(path)
    if found is None:
        return None
    for answer, test in ((("file"), stat.S_ISREG), ("folder", stat.S_ISDIR), ("link", stat.S_ISLNK)):
        if test(found.st_mode):
            return answer  # type: ignore[return-value]
    return "other"


def names(folder: Path) -> list[str]:
    """What a folder holds, sorted."""
    with _operation("list", folder):
        return sorted(os.listdir(folder))


def open_file(path: Path, *, create: bool) -> int:
    """Open a regular file for reading and writing; its mode is the umask's. Links at the end are not followed."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with _operation("open", path):
        return os.open(path, flags | os.O_CREAT if create else flags, 0o666)


def open_existing(path: Path) -> int | None:
    """``open_file``, or None if there is no such file."""
    with _operation("open", path):
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None


def close(descriptor: int, path: Path) -> None:
    """Close it, whatever happens: a descriptor kept open could keep the lock."""
    try:
        with _operation("close", path):
            pass
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, path: Path) -> bool:
    """Take the lock that the kernel releases when this process ends; False if another one holds it."""
    with _operation("lock", path):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def same_file(descriptor: int, path: Path) -> bool:
    """Whether the open file still is the one at ``path``."""
    found = status(path)
    return found is not None and os.path.samestat(found, os.fstat(descriptor))


def reserve(descriptor: int, path: Path, size: int) -> None:
    """Make the file ``size`` bytes long and, where the file system can, sure of its space on disk."""
    with _operation("reserve", path, size):
        if size and _fallocate is not None:
            if _fallocate(ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
                return
            code = ctypes.get_errno()
            if code not in _NOT_SUPPORTED:
                raise OSError(code, os.strerror(code))
        os.ftruncate(descriptor, size)


def write(descriptor: int, path: Path, data: memoryview, offset: int) -> None:
    """Write all of ``data`` (bytes) at ``offset``."""
    with _operation("write", path, len(data)):
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + done)


def start_writeback(descriptor: int, start: int, stop: int, *, wait: bool = False) -> None:
    """Ask the kernel to begin storing these bytes, so that the fsync at the end finds little left to do.

    Asking waits where the disk is slower than the run. So one thread at a time asks, which keeps the disk busy, and the
    others go on, unless they are to ``wait``: what they leave out is stored later.
    """
    if not durable or _sync_file_range is None or stop <= start or not _asking.acquire(blocking=wait):
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


def read(descriptor: int, path: Path, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset``; the number of bytes there were."""
    with _operation("read", path):
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done


def size(descriptor: int, path: Path) -> int:
    with _operation("stat", path):
        return os.fstat(descriptor).st_size


def truncate(descriptor: int, path: Path, size: int) -> None:
    with _operation("truncate", path):
        os.ftruncate(descriptor, size)


def sync(descriptor: int, path: Path) -> None:
    """Wait until the disk has stored the file, unless the process is not to be ``durable``."""
    if not durable:
        return
    with _operation("fsync", path):
        os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """The same for the names in a folder; nothing where the file system has no such operation."""
    if not durable:
        return
    with _operation("fsync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        finally:
            os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    with _operation("rename", new):
        os.rename(old, new)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they exist."""
    with _operation("mkdir", path):
        os.makedirs(path, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds. Links are removed, never followed. Nothing there is fine."""
    what = kind(path)
    if what == "folder":
        for name in names(path):
            remove(path / name)
        with _operation("rmdir", path):
            os.rmdir(path)
    elif what is not None:
        with _operation("unlink", path):
            os.unlink(path)
