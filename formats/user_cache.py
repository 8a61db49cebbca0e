"""Where qz keeps what is of use to a later run of the same user: nothing that the output depends on."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """``$QZ_CACHE``, else ``qz`` in the user's cache folder; None where nothing is to be kept, or there is no place."""
    chosen = os.environ.get("QZ_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    # Without a home, as in a container with a numeric user, "~" stays as it is; it must not become a folder's name.
    places = (os.environ.get("XDG_CACHE_HOME") or "", os.path.expanduser("~/.cache"))
    caches = next(filter(os.path.isabs, places), None)
    return Path(caches, "qz") if caches else None
