"""The command ``qz``. Its own help is a file, shown without importing Typer."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from qz.cli.streams import closed_pipe, flush_streams, open_streams, tell

HELP = Path(__file__).with_name("help.txt")
"""What Typer shows on a terminal of ``WIDTH`` columns or more; written by ``make docs``."""
WIDTH = 80
HELP_REQUESTS: tuple[list[str], ...] = ([], ["--help"], ["-h"], ["help"])


def main() -> NoReturn:
    """Run the command line of this process, and end it."""
    gc.disable()  # imported modules are never garbage; ``invoke`` enables it again
    open_streams()
    words = sys.argv[1:]
    if words in HELP_REQUESTS and "_QZ_COMPLETE" not in os.environ and shutil.get_terminal_size().columns >= WIDTH:
        code = show_help(asked=bool(words))
    else:
        code = run_command(words)
    # Python's own exit takes half a second for the libraries, aborts after a lost GPU and, whatever the code, ends by
    # SIGINT if an interrupt came in code that was executed from a string, as that of dataclasses is (3.11).
    flush_streams()
    os._exit(code)


def show_help(*, asked: bool) -> int:
    """Returns the exit code: 2, a usage error, for ``qz`` without arguments."""
    try:
        sys.stdout.write(HELP.read_text(encoding="ascii"))
        sys.stdout.flush()
    except BrokenPipeError:
        return closed_pipe()
    except OSError as error:
        tell(f"Error: The help cannot be written: {error.strerror}. Free some space, or write it elsewhere.\n")
        return closed_pipe()
    return 0 if asked else 2


def run_command(words: list[str]) -> int:
    """The exit code of the command that the words call."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the app handles it: an early Ctrl-C shows no traceback
    from qz.cli.app import run
    from qz.quantize.libraries.importing import lean_imports

    lean_imports.allow()
    return run(words)
