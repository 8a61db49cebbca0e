"""The side that answers: it has a library build one class after another, until its input ends."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from qz import QzError
from qz.quantize.libraries import answer_cache
from qz.quantize.libraries.examine import ask_library
from qz.quantize.libraries.importing import lean_imports, work_bounds
from qz.quantize.libraries.process.frames import READY, receive, send
from qz.trace import trace_lines

STACK = 8 << 20
"""Bytes for a thread, as most systems have it."""


def main(level: str, *kept: str) -> None:
    """``level``: of bitsandbytes' log; ``kept``: packages that the libraries are to find."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with answers
    questions = sys.stdin.buffer
    logging.getLogger("bitsandbytes").setLevel(int(level))
    lean_imports.allow()
    lean_imports.keep(kept)
    work_bounds.set_hard(work_bounds.IN_ALL if lean_imports.is_allowed() else None)
    threading.stack_size(STACK)  # an unusually large default would exceed the memory bound at once
    send(answers, READY)
    while (question := receive(questions)) is not None:
        send(answers, json.dumps(_answered(question, questions, answers)).encode())


def _answered(data: bytes, questions: IO[bytes], answers: IO[bytes]) -> dict[str, Any]:
    checkpoint, tensors, request, question, can_compare = pickle.loads(data)  # noqa: S301  of the parent process
    compared = False

    def compare(one: str, other: str) -> bool:
        nonlocal compared
        compared = True
        send(answers, json.dumps({"equal": [one, other]}).encode())
        return receive(questions) == b"1"

    try:
        architecture = ask_library(checkpoint, tensors, request, compare if can_compare else None)
    except Exception as error:  # noqa: BLE001  sent as it is, and raised again by the asking process
        told = error if isinstance(error, QzError | MemoryError) else None
        return {
            "error": next(
                (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "qz"), type(error).__name__
            ),
            "kind": getattr(told, "kind", None),
            "message": str(error),
            "trace": "\n".join(trace_lines(error)),
        }
    encoded = answer_cache.encoded(architecture)
    if encoded is None:
        return {}
    if not compared:
        answer_cache.keep(question, encoded)
    return {"architecture": encoded}


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the asking process has ended
        main(*sys.argv[1:])
    os._exit(0)
