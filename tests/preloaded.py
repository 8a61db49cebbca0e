"""Pythons that start with the libraries imported: a process imports them once, and forks for each that asks.

``python preloaded.py ADDRESS ARGUMENTS`` is ``python ARGUMENTS`` in such a fork, with its own environment, folder and
standard streams. The workers of xdist and the server of ``forked`` are such: by itself each would spend its first 15
seconds on the same imports. At ``ADDRESS.torch`` is one that has imported torch alone, for programs of which it matters
how they import the libraries, and at ``ADDRESS.qz`` one that has imported all of qz as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import NoReturn

IMPORTED = (
    "accelerate",
    "bitsandbytes",
    "gguf",
    "model_signing",
    "numba",
    "peft",
    "pydantic",
    *("full_checkpoints", "mixtures", "pipelines", "tiny_denoisers"),  # the classes that tests build
)
PATIENCE = 600
"""Seconds to wait for the imports: a guard against hanging."""


def import_qz() -> None:
    """Every module, but those that are programs."""
    for module in pkgutil.walk_packages(importlib.import_module("qz").__path__, "qz."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


class Preloaded:
    """The process that imports and forks. It ends with the one that started it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        address = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE)
        self.python = (sys.executable, __file__, address)
        """The command to which a Python's arguments are added."""
        self.python_with_torch = (sys.executable, __file__, f"{address}.torch")
        self.python_with_qz = (sys.executable, __file__, f"{address}.qz")

    def end(self) -> None:
        self._process.communicate()
        self._folder.cleanup()


def ask(address: str, arguments: list[str]) -> None:
    """Have a fork made, hand it what this process has, and wait for its end. Ctrl-C is the fork's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = connected(address)
    wish = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with connection, connection.makefile("rw") as lines:
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        lines.write(json.dumps(wish) + "\n")
        lines.flush()
        fork = int(lines.readline())

        def end(*_: object) -> NoReturn:
            os.kill(fork, signal.SIGKILL)
            sys.exit()

        signal.signal(signal.SIGTERM, end)
        sys.exit(int(lines.read() or 1))  # once the fork has ended


def connected(address: str) -> socket.socket:
    end = time.monotonic() + PATIENCE
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            assert not failed(address).exists(), "the libraries could not be imported"
            assert time.monotonic() < end, "the libraries were not imported"
            time.sleep(0.05)
        else:
            return connection


def failed(address: str) -> Path:
    """What is left by one that could not import: whoever waits need wait no longer."""
    return Path(f"{address}.failed")


def serve(address: str) -> None:
    """Import, and fork for each that asks, until standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    re._MAXCACHE = 1 << 16  # type: ignore[attr-defined]  # transformers has more patterns, which each fork would compile
    importlib.import_module("torch")
    if os.fork() == 0:
        address = f"{address}.torch"
    else:
        for name in IMPORTED:
            importlib.import_module(name)
        if os.fork() == 0:
            address = f"{address}.qz"
            import_qz()
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that end leave nothing behind
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            become(connection)
        connection.close()


def become(connection: socket.socket) -> NoReturn:
    """In the fork: be the Python that was asked for. Whoever asked waits until the connection is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: object = 1
    fork, leave = os.getpid(), os._exit

    def leave_and_tell(status: int) -> NoReturn:
        if os.getpid() == fork:  # and not a fork of it
            with contextlib.suppress(OSError):
                connection.sendall(str(status).encode())
        leave(status)

    os._exit = leave_and_tell  # by which some programs end, as qz does
    try:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - what is open may be another kind of file now
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
        wish = json.loads(connection.makefile("r").readline())
        connection.sendall(f"{os.getpid()}\n".encode())
        os.chdir(wish["folder"])
        os.environ.clear()
        os.environ.update(wish["environment"])
        if constants := sys.modules.get("huggingface_hub.constants"):
            importlib.reload(constants)  # which it read from the environment
        run(wish["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def run(arguments: list[str]) -> None:
    """``python FILE …``, ``-m MODULE …`` or ``-c CODE …``; also ``-u -c CODE``, as execnet starts a worker."""
    kind, *rest = arguments[arguments[0] == "-u" :]
    if kind == "-c":
        sys.argv = [kind, *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], vars(sys.modules["__main__"]))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[2:]:
        ask(sys.argv[1], sys.argv[2:])
    else:
        try:
            serve(sys.argv[1])
        except BaseException:
            failed(sys.argv[1]).touch()
            raise
