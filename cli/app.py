"""The Typer app and ``run()``: the one place where errors become text and exit codes."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from types import FrameType
from typing import Any

import typer.main

from qz import QzError, Unsupported, one_line
from qz.cli.coercion import LeanCommand, LeanGroup
from qz.cli.options.general import DebugOpt, VersionOpt
from qz.cli.output import say, warn, wrapped
from qz.cli.streams import closed_pipe, spell_out
from qz.formats.output.storage.signals import Arrival
from qz.open_files import remedy
from qz.out_of_memory import is_out_of_memory
from qz.quantize.libraries.importing.boundary import broken_import
from qz.redaction import redact
from qz.trace import trace_lines

NARROW = 72
"""Columns that the boxes of Rich's help need: in fewer it cuts the names of options."""
MOST_LINES = 5
"""What stderr gets of an error, at most. The whole message is in the JSON, and shown with ``--debug``."""

COMMANDS = {
    "quantize": "Quantize a model or a pipeline to 4 or 8 bit.",
    "inspect": "Show what a checkpoint contains, and what is wrong with it.",
    "dequantize": "Turn a quantized model back into an ordinary one.",
    "push": "Publish a checkpoint on the Hub.",
    "merge": "Put together what --part runs made.",
    "verify": "Compare an output with its hashes or its source.",
    "attest": "State and sign what an output is made of.",
    "calibrate": "Record statistics of a model's inputs, for better quantization.",
    "compare": "Show what quantizing changed.",
}
EXAMPLES = {
    "quantize": (
        "qz quantize black-forest-labs/FLUX.1-dev --nf4",
        "qz quantize ./my-model --int8 --output my-model-int8",
        "qz quantize ./my-model --skip lm_head --dry-run",
    ),
    "inspect": ("qz inspect ./my-model-nf4", "qz inspect ./my-model --tensors --filter '*.0.*'"),
    "dequantize": ("qz dequantize ./my-model-nf4 --dtype bf16", "qz dequantize ./my-model-nf4 --against ./my-model"),
    "push": ("qz push ./my-model-nf4 me/my-model-nf4", "qz push ./my-model-nf4 me/my-model-nf4 --dry-run"),
    "merge": ("qz merge ./my-model-nf4", "qz merge ./my-model-nf4 --push me/my-model-nf4"),
    "verify": ("qz verify ./my-model-nf4", "qz verify ./my-model-nf4 --against ./my-model --sample 5%"),
    "attest": ("qz attest ./my-model-nf4", "qz attest ./my-model-nf4 --source ./my-model --sign-key key.pem"),
    "calibrate": (
        "qz calibrate ./my-model -o my-model.statistics.safetensors",
        "qz calibrate ./my-model -o my-model.statistics.safetensors --text prose.txt --hessians",
    ),
    "compare": ("qz compare ./my-model ./my-model-nf4", "qz compare ./my-model ./my-model-nf4 --text prose.txt --json"),
}
"""Shown at the end of each command's help."""
DISTRIBUTIONS = {"accelerate", "bitsandbytes", "diffusers", "huggingface_hub", "numpy", "torch", "transformers"}


def app(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The app with these commands, whose modules are imported. Describing all of them takes as long as ``inspect``."""
    width = shutil.get_terminal_size().columns
    narrow = width < NARROW
    made = typer.Typer(
        name="qz",
        cls=LeanGroup,
        epilog="Exit codes: 0 done, 1 a bug, 2 usage, 65 bad input, 66 input not found, 69 Hub unreachable, "
        "73 output refused, 74 I/O, 75 try again, 77 permission denied, 78 unsupported.",
        context_settings={"help_option_names": ["--help", "-h"], **({"terminal_width": width - 2} if narrow else {})},
        pretty_exceptions_enable=False,
        rich_markup_mode=None if narrow else "rich",
    )
    made.callback()(global_options)
    for name in commands:
        examples = [continued(line, width - 8) for line in EXAMPLES[name]] if narrow else EXAMPLES[name]
        epilog = "\n\n".join(["Examples:", *examples])
        function = getattr(importlib.import_module(f"qz.cli.commands.{name}"), name)
        made.command(name, cls=LeanCommand, short_help=COMMANDS[name], epilog=epilog)(function)
    return made


def continued(line: str, width: int) -> str:
    """A command on lines of ``width`` columns, which a shell joins when they are pasted. ``\b``: Typer keeps them."""
    lines = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    return "\b\n" + " \\\n  ".join(lines)


def global_options(
    version: VersionOpt = False,
    debug: DebugOpt = False,
) -> None:
    """Quantize Hugging Face models to 8 and 4 bit with bitsandbytes, and convert them back."""


class Interruption:
    """Turns the first SIGINT or SIGTERM into KeyboardInterrupt, so that work stops cleanly. The second ends the process
    at once, unless it is an echo of the first.

    What handles the interrupt may say how to go on with ``add_note``; that becomes part of the message.
    """

    def __init__(self) -> None:
        self.first: Arrival | None = None
        self.error = KeyboardInterrupt()
        self.late = False
        """Set when the command has ended; an interrupt no longer changes how."""
        for number in (signal.SIGINT, signal.SIGTERM):
            # What a parent told us to ignore, as nohup and background jobs of a script do, stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.receive)
        sys.unraisablehook = self.dropped

    def receive(self, number: int, _: FrameType | None) -> None:
        if self.first is not None:
            if self.first.echoed_by(number):
                return
            if sys.stderr.isatty():
                # Erase the progress bar and show the cursor, which it has hidden.
                os.write(sys.stderr.fileno(), b"\r\x1b[2K\x1b[?25h")
            os._exit(128 + number)
        if not self.late:
            self.first = Arrival(number)
            raise self.error

    def dropped(self, found: sys.UnraisableHookArgs) -> None:
        """Raise the interrupt again in a moment where Python dropped it, as in a finalizer."""
        if found.exc_value is self.error:
            signal.signal(signal.SIGALRM, self.again)  # not before: an alarm from outside ends the process
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            sys.__unraisablehook__(found)

    def again(self, *_: object) -> None:
        raise self.error

    def became(self, error: Exception) -> None:
        """Add what the interrupt was turned into on its way, as by a library that was being imported, and its notes."""
        self.error.__context__ = error
        for note in getattr(error, "__notes__", ()):
            self.error.add_note(note)

    @property
    def exit_code(self) -> int:
        return 128 + (self.first.number if self.first else signal.SIGINT)

    @property
    def message(self) -> str:
        return one_line(" ".join(["Interrupted.", *getattr(self.error, "__notes__", ())]))


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code. Errors go to stderr, and with --json to stdout too."""
    spell_out()
    if not hasattr(signal, "SIGALRM"):
        say("Error: qz runs on Linux and macOS. On Windows, use WSL: https://learn.microsoft.com/windows/wsl/install")
        return Unsupported.exit_code
    own = list(args[: args.index("--")] if "--" in args else args)
    debug, as_json = "--debug" in own, "--json" in own
    # --debug belongs to the app, and may stand behind the command.
    args = ["--debug"] * debug + as_options([arg for arg in own if arg != "--debug"]) + list(args[len(own) :])
    quiet_libraries(debug)
    interruption = Interruption()
    try:
        code = invoke(args or ["--help"])
        sys.stdout.flush()
        interruption.late = True
    except SystemExit as error:  # shell completion, and Typer on a pipe that was closed
        return closed_pipe() if isinstance(error.__context__, OSError) else int(error.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        return closed_pipe()
    except Exception as error:  # noqa: BLE001  the one place that turns them into text
        if interruption.first is None:
            interruption.late = True
            code, message = explain(error)
            report(code, message, as_json=as_json, trace=error if debug else None)
            return code
        interruption.became(error)
        code = 130
    if code == 130:  # also what Typer makes of KeyboardInterrupt
        code = interruption.exit_code
        report(code, interruption.message, as_json=as_json, trace=interruption.error if debug else None)
    return int(code or 0) if args else 2


def as_options(args: list[str]) -> list[str]:
    """``qz version``, ``qz help`` and ``qz help COMMAND`` as the options that they stand for."""
    if args[:1] == ["version"]:
        return ["--version", *args[1:]]
    if args[:1] == ["help"]:
        return [*args[1:2], "--help"]
    return args


def invoke(args: Sequence[str]) -> Any:
    """Hand a command line to Typer. The app's own help is plain text: Rich would take half of the time it needs."""
    first = next((word for word in args if not word.startswith("-")), None)
    group = described((first,) if first in COMMANDS else tuple(COMMANDS), shutil.get_terminal_size().columns)
    if not gc.isenabled():  # the process runs one command: see ``entry``
        gc.freeze()
        gc.enable()
    return group.main(args=args, prog_name="qz", standalone_mode=False)


@cache
def described(commands: tuple[str, ...], width: int) -> Any:  # noqa: ARG001  the help is laid out for it
    """The app as Typer runs it; made once for a program that runs many command lines."""
    group: Any = typer.main.get_command(app(commands))
    group.rich_markup_mode = None
    return group


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the message of anything that was raised."""
    if isinstance(error, QzError):
        return error.exit_code, str(error) or type(error).__name__
    text = one_line(str(error)) or type(error).__name__
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        hint = f"Run `{context.command_path} --help` to see what there is." if context else ""
        if context and context.parent is None and "No such option" in error.format_message():
            hint = f"Options come after the command: `qz inspect SOURCE --json`. {hint}"
        told = " ".join(error.format_message().replace("Value error, ", "").split())
        return error.exit_code, f"{told}\n{hint}".rstrip()
    if is_out_of_memory(error):
        return 75, f"Out of memory: {text}. Close other programs, or use --threads 1 or --device cpu."
    if isinstance(error, PermissionError):
        return 77, f"{describe(error)}. Check the permissions of that path."
    if isinstance(error, FileNotFoundError):
        return 66, f"{describe(error)}."
    if isinstance(error, ConnectionError | TimeoutError):
        return 69, f"The connection failed: {text}. Try again."
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        otherwise = f"{'Free some space' if full else 'Check the disk'}, and run the command again."
        return 74, f"{describe(error)}. {remedy(error, otherwise)}"
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in DISTRIBUTIONS:
        return 78, f"{text}. Install qz with its dependencies: pip install qz-cli."
    if broken := broken_import(error):
        return 78, broken
    kind = type(error).__name__
    advice = "This is a bug in qz. Run the command again with --debug, and report what it shows."
    return 1, f"Internal error: {kind}: {text}\n{advice}"


def describe(error: OSError) -> str:
    """What the system said, and about which path."""
    return one_line(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))


def report(code: int, message: str, *, as_json: bool, trace: BaseException | None = None) -> None:
    """The message on stderr, with its traceback if asked for, and as the last line of stdout with --json."""
    if trace is not None:
        say(*trace_lines(trace))
    lines = f"Error: {message}".rstrip().split("\n")
    if len(lines) > MOST_LINES and trace is None:
        left = len(lines) - MOST_LINES + 1
        lines = [*lines[: MOST_LINES - 1], f"… and {left} more lines; --debug shows them all."]
    try:
        say(*(part for line in lines for part in wrapped(line)))
        if as_json:
            error = {"type": "exit_error", "code": code, "message": redact(message)}
            sys.stdout.write(json.dumps(error) + "\n")
        sys.stdout.flush()
    except OSError:
        closed_pipe()


class WarningHandler(logging.Handler):
    """What the core logs while it waits, as a warning on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def quiet_libraries(debug: bool) -> None:
    """Keep the libraries' own talk off the terminal; qz says what matters. What the user has set is left alone."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("qz").handlers = [WarningHandler()]
    if debug:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
