"""The side that asks: it starts the other process, hands it a checkpoint's headers, and takes an architecture from it.

What comes back is JSON, since a library works with an untrusted config there.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import qz
from qz import QzError, TryAgain, Unsupported
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.files.folder import read_file
from qz.formats.json_files import MAX_CONFIG_BYTES
from qz.formats.malformed import Malformed
from qz.formats.tensors.decoded import StoredTensor
from qz.quantize.libraries.answer_cache import GENERATION_CONFIG, decoded
from qz.quantize.libraries.architecture import Architecture, LoadRequest, TensorSpec
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.work_bounds import BYTES_PER_TENSOR
from qz.quantize.libraries.process import do_meanwhile
from qz.quantize.libraries.process.documents import Documents
from qz.quantize.libraries.process.frames import READY, receive, send

MODULE = "qz.quantize.libraries.process.answering"


class _Asked(threading.local):
    """The process that this thread asks: one thread's question and answer are not another's."""

    process: _Process | None = None
    together = 0


_asked = _Asked()


class PlanningFailed(Exception):
    """An error in the other process that no checkpoint explains: a bug."""


@contextmanager
def together() -> Iterator[None]:
    """What is asked inside is asked of one process."""
    _asked.together += 1
    try:
        yield
    finally:
        _asked.together -= 1
        if not _asked.together:
            close()


def ask(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorSpec],
    request: LoadRequest,
    question: str,
    equal: Callable[[str, str], bool] | None,
) -> Architecture | None:
    """As ``examine``, with its errors; None where it has to be asked here: the answer holds functions of the library,
    or no process could be started."""
    with together():
        if _asked.process is None:
            _asked.process = _Process.started()
        if _asked.process is None:
            return None
        folder = Documents(checkpoint.folder.location)
        if GENERATION_CONFIG in checkpoint.folder.sizes():
            folder.add(GENERATION_CONFIG, read_file(checkpoint.folder, GENERATION_CONFIG, MAX_CONFIG_BYTES))
        names = {name: StoredTensor(name, "", (), "", 0, 0) for name in checkpoint.tensors}
        told = replace(checkpoint, folder=folder, tensors=names, index=None, header_metadata={})
        try:
            asked = pickle.dumps((told, dict(tensors), request, question, equal is not None))
            return _asked.process.answer(asked, equal)
        except BaseException:
            close()
            raise


def close() -> None:
    """End the other process, if there is one."""
    process, _asked.process = _asked.process, None
    if process is not None:
        process.end()


class _Process:
    """The other process. It ends when its input does, and by ``end`` in any case."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._in, self._out = process, process.stdin, process.stdout

    @classmethod
    def started(cls) -> _Process | None:
        """With the settings of this one; None where it does not come up."""
        if getattr(sys, "frozen", False):  # sys.executable is the frozen program itself, which would start again
            return None
        quiet = bool(warnings.filters) and warnings.filters[0][0] == "ignore"
        level = logging.getLogger("bitsandbytes").level
        # -P: the working directory, which may be a download, is no place to import from.
        words = [sys.executable, "-P", *(["-W", "ignore"] if quiet else []), "-m", MODULE, str(level)]
        own = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        # Classes are built on meta: probing for a GPU would take seconds, and memory beyond the bound.
        own |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
        own["PYTHONPATH"] = os.pathsep.join(_import_paths())  # a program may have changed sys.path
        # transformers hands each tensor to one of four threads, to read it: on meta there is nothing to read.
        own["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        # diffusers makes each weight on the CPU before it is on meta: what glibc keeps of those, as holes in which the
        # next does not fit, counts as memory taken, and grows with the model.
        own["MALLOC_MMAP_THRESHOLD_"] = str(BYTES_PER_TENSOR)
        try:
            process = subprocess.Popen(  # noqa: S603  this Python and this package
                [*words, *sorted(lean_imports.kept())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **own},
                process_group=0,  # Ctrl-C goes to the parent only, which ends this process
            )
        except (OSError, ValueError):
            return None
        found = cls(process)
        try:
            if receive(found._out) == READY:
                return found
        except BaseException:
            found.end()
            raise
        found.end()
        return None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out):
            with suppress(OSError):
                stream.close()

    def answer(self, question: bytes, equal: Callable[[str, str], bool] | None) -> Architecture | None:
        with suppress(BrokenPipeError):
            send(self._in, question)
        do_meanwhile()
        while (data := receive(self._out)) is not None:
            said = json.loads(data)
            if "equal" not in said:
                return _taken(said)
            assert equal is not None
            one, other = said["equal"]
            answer = equal(one, other)
            with suppress(BrokenPipeError):
                send(self._in, b"1" if answer else b"0")
        raise _ended(self._process.wait())


def _import_paths() -> list[str]:
    """``sys.path`` without the working directory, unless ``PYTHONPATH`` names that."""
    here, named = os.path.realpath(os.getcwd()), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [place for place in sys.path if place and (place in named or os.path.realpath(place) != here)]


def _taken(said: dict[str, Any]) -> Architecture | None:
    if "architecture" in said:
        return decoded(said["architecture"])
    if "error" not in said:
        return None
    error = _error(said["error"], said["kind"], said["message"])
    error.add_note(said["trace"])
    raise error


def _error(name: str, kind: str | None, message: str) -> Exception:
    """The error as it was in the other process."""
    found = getattr(qz, name, None)
    if kind is not None:
        return Malformed(kind, message)
    if isinstance(found, type) and issubclass(found, QzError):
        return found(*message.split("\n"))
    return MemoryError(message) if name == "MemoryError" else PlanningFailed(f"{name}: {message}")


def _ended(code: int) -> QzError:
    """What it means that the other process ended without an answer. ``code``: minus the signal that ended it."""
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        return TryAgain(
            "The process that builds the model was ended by the system, most likely for lack of memory. Close other "
            "programs, and run the same command again."
        )
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Unsupported(
        f"The library crashed while it built the model ({name}). Check config.json, or try another version of it."
    )
