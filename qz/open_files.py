"""What to do when no file can be opened any more."""

from __future__ import annotations

import errno


def remedy(error: OSError, otherwise: str) -> str:
    """The sentence that follows ``error``: of too many open files how there can be more, else ``otherwise``."""
    if error.errno == errno.EMFILE:
        return "Raise the limit (ulimit -n), then run the same command again."
    if error.errno == errno.ENFILE:
        return "Close other programs, then run the same command again."
    return otherwise
