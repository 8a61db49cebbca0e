"""Draw docs/terminal.svg from a real session: the demo's model is quantized and inspected. Run by ``make picture``."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from demo import MODEL, fetch

PICTURE = Path("docs") / "terminal.svg"
WIDTH = 96
SESSION = (
    ("quantize", "all-MiniLM-L6-v2", "--nf4", "--scales", "search"),
    ("inspect", "all-MiniLM-L6-v2-nf4"),
)


def main() -> None:
    fetch()
    folder = MODEL.resolve().parent / "session"
    folder.mkdir(exist_ok=True)
    named = folder / "all-MiniLM-L6-v2"
    if not named.exists():
        named.symlink_to(MODEL.resolve())
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for arguments in SESSION:
        console.print(Text.assemble(("$ ", "bold green"), ("qz " + " ".join(arguments), "bold")))
        console.print(Text.from_ansi(shown(folder, *arguments)))
    PICTURE.write_text(console.export_svg(title="qz"), encoding="utf-8")
    print(f"{PICTURE} is written.")


def shown(folder: Path, *arguments: str) -> str:
    """What stays of a command on a terminal of this width, with its colours: its progress is gone when it is done."""
    overwrite = ("--overwrite",) if arguments[0] == "quantize" else ()
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "qz", *arguments, *overwrite]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    talk = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("Quantizing: ")]
    before = [line for line in talk if line.startswith("Warning: ")]
    return "".join([*before, done.stdout, *talk[len(before) :]])


if __name__ == "__main__":
    main()
