"""A hook for every operation on files of a whole command, which makes its own ``Disk``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod

import pytest

from qz.formats.output.storage.disk import KEEP_EVERY, Disk


@contextmanager
def every_disk(hook: Callable[[str, str], None], keep_every: int = KEEP_EVERY) -> Iterator[None]:
    """Inside, each ``Disk`` that is made calls ``hook`` before every operation, and has this ``keep_every``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Disk, "__init__", partialmethod(Disk.__init__, hook=hook, keep_every=keep_every, keep_apart=0))
        yield
