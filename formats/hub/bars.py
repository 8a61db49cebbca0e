"""The bars that huggingface_hub draws: none while it works for qz, and then each group's setting as it was found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, exported by name only

_lock = threading.Lock()
_inside = 0
_found: dict[str, bool] = {}


@contextmanager
def bars_as_found() -> Iterator[None]:
    """Inside, bars may be switched on and off, by transformers too; the last to leave gives the settings back."""
    global _inside
    states = import_module("huggingface_hub.utils.tqdm").progress_bar_states  # by group; no function tells them
    with _lock:
        if not _inside:
            _found.clear()
            _found.update(states)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                states.clear()
                states.update(_found)


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, huggingface_hub draws none, unless the environment asks for them: progress is a callback."""
    with bars_as_found():
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:
            disable_progress_bars()
        yield
