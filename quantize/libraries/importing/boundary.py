"""The boundary around a library that builds a model from an untrusted config, which is to blame for what it raises."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import TracebackType

from qz import QzError, Unsupported
from qz.quantize.libraries.importing import lean_imports

SURROUNDINGS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EACCES))
"""What the system says of itself, not of a config."""
FORWARDING = ("__torch_function__", "__torch_dispatch__")
"""What torch calls for each operation of a library, and what has it done."""
CONVERTER_ERRORS = (LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError)
"""What diffusers' converters raise for tensors that are not what they expect; they do not look first."""


@contextmanager
def library_errors(library: str, built: str, where: str) -> Iterator[None]:
    """Turn any exception that ``library`` raises inside into Unsupported, with its kind.

    What qz's own code raises stays as it is, a bug or an error that says what is wrong; so does a lack of memory.
    """
    try:
        yield
    except (QzError, MemoryError):
        raise
    except Exception as error:
        if _raised_by_qz(error.__traceback__) or (isinstance(error, OSError) and error.errno in SURROUNDINGS):
            raise
        lean = "set QZ_LEAN=0, which imports the libraries whole" if lean_imports.is_allowed() else ""
        advice = f"Check config.json, try another version of {library}{lean and f', or {lean}'}."
        if broken := broken_import(error):
            raise Unsupported(broken) from error
        if isinstance(error, ImportError):
            advice = f"Install that too{lean and f'; if it is there, {lean}'}."
        raise Unsupported(
            f"{library} cannot build {built} from {where}/config.json: {describe(error)}. {advice}"
        ) from error


def broken_import(error: BaseException) -> str | None:
    """What to do about a package that is there and cannot be imported, such as a torchvision made for another torch.

    None where ``error`` was not raised by a package while it was imported, or says that a package is not there.
    """
    while isinstance(error, ImportError) and error.__cause__ is not None:  # transformers' own, for what it imports late
        error = error.__cause__
    importing = ""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_name == "<module>":
            importing = frame.f_globals.get("__name__", "").partition(".")[0]
    if importing in ("", "__main__", "qz") or isinstance(error, QzError | ModuleNotFoundError | MemoryError):
        return None
    return (
        f"{importing} is installed, and cannot be imported: {describe(error)}. Install the version of it that fits the "
        f"others, or remove it if you do not need it: pip uninstall {importing}."
    )


def describe(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says, on one line."""
    said = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def _raised_by_qz(trace: TracebackType | None) -> bool:
    name = ""
    while trace is not None:
        if trace.tb_frame.f_code.co_name not in FORWARDING:
            name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name.partition(".")[0] == "qz"
