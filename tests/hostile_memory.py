"""The memory of real commands that are given something hostile: ``make hostile``.

Every case of the malformed corpus, and configs whose sizes would fill any memory, each in commands of their own. Prints
the peak of each as it ends, of any process of the command, at last the largest; ends with 1 if one is beyond the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hostile_configs import BOMBS, configure
from test_malformed import FOLDERS, build

MOST_MB = 400
SHOWN = 12
COMMANDS = {"inspect": ["inspect"], "quantize": ["quantize", "-o", "out"], "dequantize": ["dequantize", "-o", "out"]}


def chosen(only: str, part: int, parts: int) -> list[str]:
    """Names of the cases that hold ``only``; of ``parts`` as many, the ``part``-th, from 1."""
    return [name for name in [*(f"config: {name}" for name in BOMBS), *FOLDERS] if only in name][part - 1 :: parts]


def made(folder: Path, name: str) -> Path:
    """The case, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    if name in FOLDERS:
        base, changes, _ = FOLDERS[name]
        build(folder, base, changes)
    else:
        save_llama(folder)
        configure(folder, BOMBS[name.removeprefix("config: ")])
    return folder


def save_llama(folder: Path) -> None:
    """In a process of its own: what this one takes counts as its children's."""
    script = "from zoo import build; import sys; build('llama-untied').save_pretrained(sys.argv[1])"
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
    parser.add_argument("--part", default="1/1", help="I/N: the I-th of N parts of the cases")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="which commands, with commas between")
    options = parser.parse_args()
    names, commands = chosen(options.only, *map(int, options.part.split("/"))), options.commands.split(",")
    found: list[tuple[int, int, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="qz-") as folder:
        for name in names:
            place = made(Path(folder, "source"), name)
            for command in commands:
                code, peak = measured(place, COMMANDS[command])
                found.append((peak, code, command, name))
                print(f"{len(found):5} of {len(names) * len(commands)}  {told(found[-1])}", flush=True)
    beyond = [each for each in found if each[0] > MOST_MB or each[1] == 1 or each[1] < 0]
    for title, shown in (
        ("The largest:", sorted(found, reverse=True)[:SHOWN]),
        ("Beyond the bound, or ended wrongly:", beyond),
    ):
        print(title, *map(told, shown), sep="\n")
    print(json.dumps({"commands": len(found), "most_mb": max(found)[0] if found else None, "beyond": len(beyond)}))
    return 1 if beyond or not found else 0


def told(one: tuple[int, int, str, str]) -> str:
    peak, code, command, name = one
    return f"{peak:5} MB  exit {code:3}  {command:10} {name}"


if __name__ == "__main__":
    sys.exit(main())
