"""Standard streams as they should be: there when the caller closed them, and no reason to fail once they break."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress

IN_ASCII = {"→": "->", "–": "-", "−": "-", "…": "...", "×": "x", "·": "-", "█": "#"}
"""What reports are drawn with, where the locale's encoding has none of it."""


def open_streams() -> None:
    """Put /dev/null where a standard stream is closed, as in ``qz … >&-``: nobody wants to read what goes there.

    Otherwise the next file that is opened would get the stream's number, and with it all that a library prints.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            _to_dev_null(number)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115  stays open to the end
            setattr(sys, name, stream)


def spell_out() -> None:
    """Where a stream's encoding lacks a character, write ASCII in its place instead of failing."""
    codecs.register_error("qz.spelled_out", _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="qz.spelled_out")


def _spelled_out(error: UnicodeError) -> tuple[str | bytes, int]:
    """``IN_ASCII``, and Python's escape of every other character."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = [
        IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in error.object[error.start : error.end]
    ]
    return "".join(shown), error.end


def tell(text: str) -> None:
    """``text`` on stderr. If that cannot be written to, the work goes on, and the rest of the talk goes nowhere."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _to_dev_null(sys.stderr.fileno())


def closed_pipe() -> int:
    """Nobody reads what is written, or it cannot be written: end silently, with the exit code of an I/O error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_dev_null(stream.fileno())
    return 74


def flush_streams() -> None:
    """Write what is still buffered, as far as that is possible."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()


def _to_dev_null(number: int) -> None:
    """Point this descriptor at /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(null, number)
        os.close(null)
