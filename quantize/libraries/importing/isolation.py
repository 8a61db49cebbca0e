"""While a library builds a class from an untrusted config: no network, and no code but what is installed.

What a config names can reach a library's downloads, the ``kernels`` package and modules from repositories, by fields
that change from version to version. So the doors themselves are closed, by Python's audit events (PEP 578).
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from qz import Unsupported
from qz.formats.malformed import quoted

NETWORK = frozenset(("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"))
HEARD = NETWORK | {"exec", "import"}
PACKAGES = ("qz", "accelerate", "bitsandbytes", "diffusers", "huggingface_hub", "timm", "torch", "transformers")
"""May be installed where ``sys.path`` does not show it, as editable packages are."""


class Isolation:
    """One closed stretch of work. ``refused``: the first thing that was asked for in vain."""

    def __init__(self) -> None:
        self.active = True
        self.refused: Unsupported | None = None
        self.installed = _installed()
        self.downloaded = _downloaded()

    def check(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise Unsupported for an audit event that must not be."""
        if event in NETWORK:
            self._refuse("a connection to the network")
        elif event == "exec" and arguments and isinstance(arguments[0], CodeType):
            self._code(arguments[0].co_filename)
        elif event == "import" and len(arguments) > 1 and isinstance(arguments[1], str):
            self._code(arguments[1])  # of a compiled module

    def _code(self, file: str) -> None:
        if file.startswith("<"):  # made by a library out of its own text
            return
        path = os.path.realpath(file)
        if path.startswith(self.downloaded) or not path.startswith(self.installed):
            self._refuse(f"code that is not installed, {quoted(file, 300)}")

    def _refuse(self, what: str) -> None:
        error = Unsupported(
            f"Building the model asked for {what}, which qz never allows: config.json or the model's class names "
            "something outside this checkpoint. Put what it names into config.json itself, or use another checkpoint."
        )
        self.refused = self.refused or error
        raise error


_isolations: WeakKeyDictionary[threading.Thread, Isolation] = WeakKeyDictionary()
"""The isolation that a thread works in: its own, or that of the thread that started it."""
_switching = threading.Lock()
_hooked = False
_open = 0
_start = threading.Thread.start


@contextmanager
def isolated() -> Iterator[Isolation]:
    """Close the network and foreign code to this thread, and to those that it starts meanwhile; others go on.

    May be nested. A refusal that a library swallowed is raised after all if the work fails. The audit hook stays for
    the life of the process, as such hooks do; outside an isolation it does nothing.
    """
    global _open
    thread, isolation = threading.current_thread(), Isolation()
    with _switching:
        _open += 1
        _listen()
        outer = _isolations.get(thread)
        _isolations[thread] = isolation
    try:
        yield isolation
    except Exception as error:
        if isolation.refused is not None and error is not isolation.refused:
            raise isolation.refused from error
        raise
    finally:
        with _switching:
            _open -= 1
            isolation.active = False
            del _isolations[thread]
            if outer is not None:
                _isolations[thread] = outer
            if not _open and threading.Thread.start is _start_isolated:
                threading.Thread.start = _start  # type: ignore[method-assign]


@contextmanager
def trusted() -> Iterator[None]:
    """For qz's own reading in the midst of isolated work: weights that a model needs or ties, maybe from the Hub.

    The isolation of this thread rests meanwhile, and that of threads that it starts.
    """
    thread = threading.current_thread()
    with _switching:
        outer = _isolations.pop(thread, None)
    try:
        yield
    finally:
        if outer is not None:
            with _switching:
                _isolations[thread] = outer


def _listen() -> None:
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    if threading.Thread.start is _start:
        threading.Thread.start = _start_isolated  # type: ignore[method-assign,assignment]


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in HEARD and _isolations:
        isolation = _isolations.get(threading.current_thread())
        if isolation is not None and isolation.active:
            isolation.check(event, arguments)


def _start_isolated(thread: threading.Thread) -> None:
    """``Thread.start``: what an isolated thread starts is isolated with it. Python tells of it from 3.12 on only."""
    isolation = _isolations.get(threading.current_thread())
    if isolation is not None and isolation.active:
        _isolations[thread] = isolation
    _start(thread)


def _installed() -> tuple[str, ...]:
    """Folders whose code may run: Python's own, those of ``sys.path`` but the working directory, and the packages'."""
    paths = sysconfig.get_paths()
    places = [sys.prefix, sys.base_prefix, paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
    here = os.path.realpath(os.getcwd())
    places += [place for place in sys.path if place and os.path.realpath(place) != here]
    for name in PACKAGES:
        module = sys.modules.get(name)
        found = module.__spec__ if module is not None else None if name in sys.modules else find_spec(name)
        for place in (found.submodule_search_locations or ()) if found is not None else ():
            places += [place, *_linked(place)]
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable__"):  # how setuptools installs what stays where it is written
            places += [os.path.dirname(place) for place in getattr(module, "MAPPING", {}).values()]
    return tuple({os.path.join(os.path.realpath(place), "") for place in places})


@cache
def _linked(package: str) -> tuple[str, ...]:
    """Links in a package's folder, as they were when it was first looked at."""
    with os.scandir(package) as entries:
        return tuple(entry.path for entry in entries if entry.is_symlink())


def _downloaded() -> tuple[str, ...]:
    """Folders of what was downloaded from the Hub; transformers adds the one of its modules to ``sys.path``."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    named = (os.environ.get(name) for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "KERNELS_CACHE"))
    return tuple(os.path.join(os.path.realpath(place), "") for place in (home, *named) if place)
