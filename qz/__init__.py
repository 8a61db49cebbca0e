"""qz: quantize Hugging Face models to 8 and 4 bit with bitsandbytes, streamed, and convert them back.

The rooms import downwards only: ``qz.cli`` → ``qz.quantize`` → ``qz.formats``. This module holds what all of them
share: the version, and the errors that become a message and an exit code in ``qz.cli.app``.
"""

import re
from importlib import import_module
from os import PathLike
from typing import Any

__version__ = "0.1.0"


def load(
    source: str | PathLike[str],
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    device: str = "auto",
    **components: Any,
) -> Any:
    """A model or a pipeline from a folder that qz wrote: see ``qz.api.load``."""
    # By name, as the rooms import this module, and it imports none of them.
    return import_module("qz.api").load(source, subfolder=subfolder, variant=variant, device=device, **components)


LINE_BREAKS = "[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"


def one_line(text: str) -> str:
    """``text`` with its line breaks spelled out as \\n."""
    return re.sub(LINE_BREAKS, lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class QzError(Exception):
    """Something the user can act on. The message says what, where, why and what next; never raised for a bug.

    It is one line, followed by one for each of ``details``. Line breaks and the like inside of them come from names in
    files; they are spelled out, so that no name makes a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str = "", *details: str) -> None:
        super().__init__("\n".join(map(one_line, (message, *details))))


class UsageError(QzError):
    """The command line asks for something impossible."""

    exit_code = 2


class MalformedInput(QzError):
    """An input breaks its format's rules, is unsafe, or does not match what was promised of it."""

    exit_code = 65


class MissingInput(QzError):
    """An input does not exist."""

    exit_code = 66


class HubUnreachable(QzError):
    """The Hub does not answer, or may not be asked."""

    exit_code = 69


class OutputRefused(QzError):
    """The output exists already, or cannot be created."""

    exit_code = 73


class IOFailed(QzError):
    """Reading or writing failed half-way: disk full, I/O error."""

    exit_code = 74


class TryAgain(QzError):
    """Busy, or worth retrying: another run holds the output, a rate limit, a device out of memory."""

    exit_code = 75


class PermissionRefused(QzError):
    """Permission, authentication, or a gate."""

    exit_code = 77


class Unsupported(QzError):
    """The model, or the installed libraries, cannot be handled this way."""

    exit_code = 78
