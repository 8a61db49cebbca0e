"""Marks that show a run which entries of a journal this user wrote, and not someone else who may write there.

A mark is the HMAC-SHA256 (RFC 2104) of the entry under a random key, which lies in the user's own cache, readable by
nobody else.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from qz.formats.user_cache import user_cache

NAME = "journal.key"
BYTES = 32


def user_key() -> bytes | None:
    """The user's key, made if it is not there yet; None where there is no place for one, or others can read it."""
    folder = user_cache()
    if folder is None:
        return None
    path = folder / NAME
    with suppress(OSError):
        if not path.exists():
            _make(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
            key = file.read(BYTES + 1) if is_own else b""
        return key if len(key) == BYTES else None
    return None


def _make(path: Path) -> None:
    """Under another name first, so that the key is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{NAME}.{secrets.token_hex(8)}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(BYTES))
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        os.unlink(new)


def seal(key: bytes, *parts: bytes) -> str:
    """The mark of these bytes, in hexadecimal. The same bytes cut into other parts have another mark."""
    mark = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        mark.update(len(part).to_bytes(8, "big"))
        mark.update(part)
    return mark.hexdigest()


def is_sealed(mark: object, key: bytes, *parts: bytes) -> bool:
    """Whether ``mark`` is the seal of these bytes under ``key``."""
    return isinstance(mark, str) and mark.isascii() and hmac.compare_digest(mark, seal(key, *parts))
