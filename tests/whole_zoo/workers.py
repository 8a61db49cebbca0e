"""Cases run side by side, each in a process forked for it: what it imports, patches or breaks is gone with it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qz.quantize.libraries import examine
from whole_zoo.case import STAGE, Case, Row
from whole_zoo.oracles import without_limits_of_cpus

CPU_LIMIT, LIMIT = 200, 600
"""Seconds of CPU time and of wall-clock time for one case."""
ROWS = "rows.jsonl"
_PREFIX = "qz-zoo-"
_FOLDER = re.compile(re.escape(os.path.join(tempfile.gettempdir(), _PREFIX)) + r"\w*")
"""Of a case, whose name is another one every time; what is told of it may end in the middle."""


@dataclass(frozen=True, slots=True)
class _Running:
    case: Case
    folder: Path
    started: float


def run_cases(cases: Iterable[Case], jobs: int, end: float) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case as it is finished, ``jobs`` at a time; none starts after ``end``, a monotonic time."""
    waiting = iter(cases)
    running: dict[int, _Running] = {}
    try:
        while True:
            while len(running) < jobs and time.monotonic() < end and (case := next(waiting, None)) is not None:
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
                running[_fork(case, folder)] = _Running(case, folder, time.monotonic())
            if not running:
                return
            finished, status, used = os.wait3(0)
            yield [{**row, "cpu": round(used.ru_utime + used.ru_stime, 1)} for row in _rows(running[finished], status)]
            shutil.rmtree(running.pop(finished).folder, ignore_errors=True)
    finally:
        for child, unfinished in running.items():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            shutil.rmtree(unfinished.folder, ignore_errors=True)


def _fork(case: Case, folder: Path) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        signal.alarm(LIMIT)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        without_limits_of_cpus()
        vars(examine)["has_extreme_number"] = lambda *_: False  # this process is bounded: no other one for planning
        with (folder / ROWS).open("w", encoding="utf-8") as file:
            for row in case.rows(folder):
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _rows(ended: _Running, status: int) -> list[dict[str, Any]]:
    """What the case has written, and a row of its own for a process that did not end well."""
    file = ended.folder / ROWS
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    if status:
        stage = ended.folder / STAGE
        method, _, doing = (stage.read_text(encoding="utf-8") if stage.exists() else "").partition(" ")
        row = Row(ended.case.library, ended.case.kind, ended.case.architecture, method)
        how = _ending(ended.folder, status)
        if not method or "library" in doing:
            row.result, row.why = "not built" if not method else "the library fails", f"{how} {doing}".strip()
        else:
            row.faults.append(f"{how} {doing}")
        rows.append(asdict(row))
    seconds = round(time.monotonic() - ended.started, 1)
    return [{**row, "seconds": seconds} for row in json.loads(_FOLDER.sub("FOLDER", json.dumps(rows)))]


def _ending(folder: Path, status: int) -> str:
    if not os.WIFSIGNALED(status):
        lines = (folder / "output").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the process ended with {os.waitstatus_to_exitcode(status)}: {lines[-1] if lines else ''}"
    number = signal.Signals(os.WTERMSIG(status))
    if number in (signal.SIGALRM, signal.SIGXCPU):
        return f"took longer than {CPU_LIMIT} s"
    return f"the process ended with {number.name}"
