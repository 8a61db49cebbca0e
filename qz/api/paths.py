"""How a caller may name a file, a folder or a repository."""

from __future__ import annotations

from os import PathLike

AnyPath = str | PathLike[str]
