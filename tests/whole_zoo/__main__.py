"""Run the zoo: ``python -m whole_zoo``, or ``--slice --seconds N`` for a part of it that is another one every day.

Continues where the last run stopped: the rows of finished cases are lines of the results file. Those of parts run on
several machines are merged by writing their files one after the other into one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qz.counted import counted
from qz.quantize.libraries.importing import work_bounds
from whole_zoo import diffusers_cases, pipeline_cases, transformers_cases
from whole_zoo.case import Case
from whole_zoo.page import page
from whole_zoo.workers import run_cases

SOURCES = (pipeline_cases.cases, diffusers_cases.cases, transformers_cases.cases)
FIRST_IMPORTS = (
    "qz.quantize.libraries.transformers.on_transformers",
    "qz.quantize.libraries.diffusers.on_diffusers",
    "diffusers.quantizers.auto",
)
"""Imported once, before processes are forked."""
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(".zoo/results.jsonl"))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="cases at a time; all CPUs")
    parser.add_argument("--slice", action="store_true", help="begin where the day says, and keep no results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this many")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts, for several machines")
    parser.add_argument("--only", default="", help="comma-separated model types, classes or libraries")
    parser.add_argument("--page", action="store_true", help="write docs/reference/models.md from all results")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results of earlier runs")
    asked = parser.parse_args()
    if asked.page or asked.page_only:
        _require_pins()
    if asked.page and sys.flags.hash_randomization:
        sys.exit("PYTHONHASHSEED=0 is not set: errors of the libraries would name sets in another order every time")
    rows = _read(asked.results) if not asked.slice else []
    if not asked.page_only:
        rows += _run(asked, {(row["library"], row["kind"], row["architecture"]) for row in rows})
    if asked.page or asked.page_only:
        PAGE.write_text(page(rows), encoding="utf-8")
    faults = [row for row in rows if row["faults"]]
    for row in faults:
        print(f"{row['kind']} {row['architecture']} {row['method']}: {'; '.join(row['faults'])}")
    cases = {(row["library"], row["kind"], row["architecture"]): row.get("cpu", 0.0) for row in rows}
    print(f"{counted(len(cases), 'case')} in {sum(cases.values()):,.0f} s of CPU time")
    counts = Counter("fault" if row["faults"] else row["result"] for row in rows)
    print(", ".join(f"{result}: {count:,}" for result, count in counts.most_common()))
    return 1 if faults else 0


def _require_pins() -> None:
    """The page speaks of the versions that constraints.txt pins."""
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    for package in ("transformers", "diffusers", "bitsandbytes"):
        if f"{package}=={version(package)}\n" not in pins:
            sys.exit(f"{package} {version(package)} is not the version in constraints.txt: no page is made of it")


def _run(asked: argparse.Namespace, done: set[tuple[str, str, str]]) -> list[dict[str, Any]]:
    end = time.monotonic() + asked.seconds
    work_bounds.set_hard()  # each case plans in the process that is forked for it
    for module in FIRST_IMPORTS:
        import_module(module)
    cases = [case for source in SOURCES for case in source() if _asked_for(case, asked.only)]
    if asked.slice:
        first = datetime.date.today().toordinal() * 37 % len(cases)
        cases = cases[first:] + cases[:first]
    part, parts = map(int, asked.part.split("/"))
    left = [case for case in cases[part - 1 :: parts] if (case.library, case.kind, case.architecture) not in done]
    found: list[dict[str, Any]] = []
    for rows in run_cases(left, asked.jobs, end):
        found += rows
        if not asked.slice:
            asked.results.parent.mkdir(parents=True, exist_ok=True)
            with asked.results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            result = "FAULT" if row["faults"] else row["result"]
            print(f"{row['kind']:28} {row['architecture']:44} {row['method']:10} {result:16} {row['ran']}", flush=True)
    return found


def _asked_for(case: Case, only: str) -> bool:
    return not only or not {case.library, case.kind, case.architecture}.isdisjoint(only.split(","))


def _read(results: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of several one after the other: of a case that was run again, those of the last time."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    last = None
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        row = json.loads(line)
        case = (row["library"], row["kind"], row["architecture"])
        if case != last:
            found[case] = []
        found[case].append(row)
        last = case
    return [row for rows in found.values() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
