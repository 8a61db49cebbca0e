"""llama.cpp's names of tensors, as the gguf package has them, without what it leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()


@contextmanager
def untouched() -> Iterator[None]:
    """Maps of names that are made in here change nothing for those that are made later.

    A ``gguf.TensorNameMap`` of an architecture with names of its own writes them into a table that all architectures
    share (gguf 0.19, ``TensorNameMap.__init__``), and from then on a Llama's names are wrong.
    """
    import gguf

    with _LOCK:
        shared = gguf.TensorNameMap.block_mappings_cfg
        before = dict(shared)
        try:
            yield
        finally:
            shared.clear()
            shared.update(before)
