"""Tests that fork hundreds of times, run in a process that is small.

By the middle of a session the process of the tests holds gigabytes, and to fork it takes a tenth of a second of CPU
time; to fork one that imported the test's module alone, a few milliseconds.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., None])

_started: list[subprocess.Popen[bytes]] = []


def in_small_process(test: Test) -> Test:
    """Run the test's body there, with its arguments, which must be picklable. Fixtures are made here, as ever."""

    @wraps(test)
    def run(**arguments: Any) -> None:
        process = _process()
        pickle.dump((test.__module__, test.__name__, arguments), _stream(process.stdin))
        _stream(process.stdin).flush()
        kind, text = pickle.load(_stream(process.stdout))
        if kind == "skipped":
            pytest.skip(text)
        if kind == "failed":
            pytest.fail(text, pytrace=False)

    return run  # type: ignore[return-value]


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _process() -> subprocess.Popen[bytes]:
    if not _started:
        process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        _started.append(process)
        atexit.register(process.kill)
    return _started[0]


# The side of the small process


def serve() -> None:
    sys.path.append(str(Path(__file__).parent.parent))  # pytest calls a module tests.NAME
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            module, name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        test = importlib.import_module(module).__dict__[name].__wrapped__
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reading)
            with os.fdopen(writing, "wb") as file:
                pickle.dump(outcome(test, arguments), file)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            told = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(told or pickle.dumps(("failed", f"the process of the test ended with {code}")))
        answers.flush()


def outcome(test: Callable[..., None], arguments: dict[str, Any]) -> tuple[str, str]:
    try:
        test(**arguments)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except BaseException:
        return "failed", traceback.format_exc()
    return "passed", ""


if __name__ == "__main__":
    serve()
