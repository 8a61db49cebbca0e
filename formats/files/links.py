"""Which links of a local folder may lead out of it: those that the folder's owner made to share files.

A downloaded folder could hold links made by its publisher, to anything on this machine; of the links in
the Hub's own cache only those to its blobs count. A link to something of another kind is never followed.
"""

from __future__ import annotations

import os
from pathlib import Path

_SIGNS_OF_DOWNLOAD = (".git", os.path.join(".cache", "huggingface"))
_COMPONENT = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
"""A folder of a pipeline holds one of these."""


def followed(path: Path) -> Path:
    """Where a path that the user named leads, through all links; where they lead in a circle, the path itself."""
    return Path(os.path.realpath(path))


def cache_blobs(real: str) -> tuple[str, ...]:
    """Where links may lead if ``real`` lies in a snapshot of the Hub's cache (``models--…/snapshots/…``)."""
    parts = Path(real).parts
    for place in range(len(parts) - 2, 0, -1):
        if parts[place] == "snapshots" and parts[place - 1].startswith(("models--", "datasets--", "spaces--")):
            repository = os.path.join(*parts[:place])
            return os.path.join(repository, "blobs"), os.path.join(os.path.dirname(repository), "blobs")
    return ()


def is_downloaded(real: str) -> bool:
    """Whether a folder, or the one that it lies in, came from the Hub: a cache, a clone, or a download of ``hf``."""
    places = (real, os.path.dirname(real))
    return bool(cache_blobs(real)) or any(
        os.path.lexists(os.path.join(p, s)) for p in places for s in _SIGNS_OF_DOWNLOAD
    )


def is_shared_file(link: str) -> bool:
    """Whether a link leads to what its name says: a file of the same name, or weights.

    Files in the Hub's cache are named by their hash.
    """
    name, real = os.path.basename(link), os.path.realpath(link)
    if not os.path.isfile(real):
        return False
    if name in (os.path.basename(real), os.path.basename(os.readlink(link))):
        return True
    return name.endswith(".safetensors") and (real.endswith(".safetensors") or _is_blob(real))


def is_shared_component(link: str) -> bool:
    """Whether a link leads to a folder with a component of a pipeline."""
    return any(os.path.isfile(os.path.join(link, name)) for name in _COMPONENT)


def _is_blob(real: str) -> bool:
    blobs, hub = os.path.dirname(real), os.path.dirname(os.path.dirname(real))
    return os.path.basename(blobs) == "blobs" and ("--" in os.path.basename(hub) or os.path.basename(hub) == "hub")
