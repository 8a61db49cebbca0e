"""The memory of real commands that are given something hostile: ``make hostile``.

Every case of the malformed corpus, and configs whose sizes would fill any memory, each in commands of their own. Prints
the largest peaks, of any process of a command, and ends with 1 if one is beyond the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_configs import BOMBS, configure
from test_malformed import FOLDERS, build

MOST_MB = 400
SHOWN = 12
COMMANDS = {"inspect": ["inspect"], "quantize": ["quantize", "-o", "out"], "dequantize": ["dequantize", "-o", "out"]}


def cases(folder: Path, only: str) -> Iterator[tuple[str, Path]]:
    """Names of cases, and where they lie."""
    for number, (name, (base, changes, _)) in enumerate(FOLDERS.items()):
        if only in name:
            build(folder / str(number), base, changes)
            yield name, folder / str(number)
    source = folder / "llama"
    for name, config in BOMBS.items():
        if only in f"config: {name}":
            save_llama(source)
            configure(source, config)
            yield f"config: {name}", source


def save_llama(folder: Path) -> None:
    """In a process of its own: what this one takes counts as its children's."""
    script = "from zoo import build; import sys; build('llama-untied').save_pretrained(sys.argv[1])"
    subprocess.run(["rm", "-rf", folder], check=True)
    subprocess.run([sys.executable, "-c", script, folder], check=True, cwd=Path(__file__).parent, capture_output=True)


def measured(folder: Path, arguments: list[str]) -> tuple[int, int]:
    """Exit code, and the largest peak of a process in MB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "QZ_CACHE": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qz", arguments[0], str(folder), *arguments[1:]]
    with tempfile.TemporaryDirectory() as work:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss >> 10


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="which commands, with commas between")
    options = parser.parse_args()
    found: list[tuple[int, int, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="qz-") as folder:
        for name, place in cases(Path(folder), options.only):
            for command in options.commands.split(","):
                code, peak = measured(place, COMMANDS[command])
                found.append((peak, code, command, name))
    found.sort(reverse=True)
    for peak, code, command, name in found[:SHOWN]:
        print(f"{peak:5} MB  exit {code:3}  {command:10} {name}")
    beyond: list[Any] = [each for each in found if each[0] > MOST_MB or each[1] in (1, -9)]
    print(json.dumps({"commands": len(found), "most_mb": found[0][0], "beyond": len(beyond)}))
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
