"""Run the zoo: ``python -m whole_zoo``, or ``--slice --seconds N`` for a part of it that is another one every day.

Goes on where the last run stopped: finished cases are lines of the results file. Each runs in a process forked for it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from whole_zoo import diffusers_cases, transformers_cases
from whole_zoo.case import Case, Row, rows_of
from whole_zoo.page import page

SOURCES = {"transformers": transformers_cases.cases, "diffusers": diffusers_cases.cases}
"""Library → what yields its cases."""
LIMIT = 120
"""Seconds for one case."""
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(".zoo/results.jsonl"))
    parser.add_argument("--slice", action="store_true", help="begin where the day says, and keep no results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--only", default="", help="model types, by commas")
    parser.add_argument("--page", action="store_true", help="write docs/reference/models.md from all results")
    asked = parser.parse_args()
    done = _read(asked.results) if not asked.slice else []
    done += _run(asked, {(row["kind"], row["architecture"]) for row in done}, time.monotonic() + asked.seconds)
    if asked.page:
        PAGE.write_text(page(done), encoding="utf-8")
    faults = [row for row in done if row["faults"]]
    for row in faults:
        print(f"{row['kind']} {row['architecture']} {row['method']}: {'; '.join(row['faults'])}")
    print(
        ", ".join(
            f"{result or 'fault'}: {count}" for result, count in Counter(row["result"] for row in done).most_common()
        )
    )
    return 1 if faults else 0


def _run(asked: argparse.Namespace, done: set[tuple[str, str]], end: float) -> list[dict[str, Any]]:
    for library in SOURCES:  # once, before processes are forked
        import_module(f"qz.quantize.libraries.on_{library}")
    cases = [case for source in SOURCES.values() for case in source()]
    if asked.only:
        cases = [case for case in cases if case.kind in asked.only.split(",")]
    if asked.slice:
        first = datetime.date.today().toordinal() * 37 % len(cases)
        cases = cases[first:] + cases[:first]
    found: list[dict[str, Any]] = []
    for case in cases:
        if (case.kind, case.architecture) in done:
            continue
        if time.monotonic() > end:
            break
        rows = _forked(case)
        found += rows
        if not asked.slice:
            asked.results.parent.mkdir(parents=True, exist_ok=True)
            with asked.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            result = "FAULT" if row["faults"] else row["result"]
            print(f"{row['kind']:28} {row['architecture']:44} {row['method']:5} {result:16} {row['ran']}", flush=True)
    return found


def _forked(case: Case) -> list[dict[str, Any]]:
    """The rows of a case from a process of its own: what it imports, patches or breaks is gone with it."""
    folder = Path(tempfile.mkdtemp(prefix="qz-zoo-"))
    child = os.fork()
    if not child:
        signal.alarm(LIMIT)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            rows = [row.as_json() for row in rows_of(case, folder)]
            (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    try:
        rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        row = Row(case.library, case.kind, case.architecture, "")
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            row.result, row.why = "not built", f"took longer than {LIMIT} s"
        else:
            row.faults.append(f"the process ended with status {status}")
        rows = [row.as_json()]
    shutil.rmtree(folder, ignore_errors=True)
    return list(rows)


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


if __name__ == "__main__":
    sys.exit(main())
