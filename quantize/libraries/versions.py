"""Which versions of the libraries this qz works with, as its own package says."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def requirement(library: str) -> str:
    """What to give to pip for a version of ``library`` that qz works with: ``transformers<6,>=5.23``."""
    try:
        declared = requires("qz-cli") or []
    except PackageNotFoundError:
        declared = []
    found = (line.partition(";")[0].strip() for line in declared if re.match(rf"{library}\b", line))
    return next(found, library)
