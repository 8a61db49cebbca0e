"""Which part of N a run is to make: as it was said, or as the engine that started it says in its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qz import UsageError
from qz.formats.output.shares import Share

INDEXES = (
    ("GitLab CI", "CI_NODE_INDEX", 1, "CI_NODE_TOTAL"),
    ("AWS Batch", "AWS_BATCH_JOB_ARRAY_INDEX", 0, "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("Google Cloud Batch", "BATCH_TASK_INDEX", 0, "BATCH_TASK_COUNT"),
    ("Cloud Run", "CLOUD_RUN_TASK_INDEX", 0, "CLOUD_RUN_TASK_COUNT"),
    ("Kubernetes", "JOB_COMPLETION_INDEX", 0, None),
)
"""Engine, variable of the task's number, the first number, and variable of the count, if there is one."""


def parse_part(text: str, environment: Mapping[str, str]) -> Share:
    """``3/7``; ``auto``, for the task's number and the count of an array job; ``auto/7`` if only the number is known.

    Raises UsageError.
    """
    match = re.fullmatch(r"\s*(auto|\d{1,6})(?:\s*/\s*(\d{1,6}))?\s*", text, re.ASCII)
    if match is None or (match[1] != "auto" and match[2] is None):
        raise UsageError(f"--part {text!r} is not I/N, as in 3/7, nor auto or auto/N.")
    if match[1] != "auto":
        return Share(int(match[1]), int(match[2]))
    count = int(match[2]) if match[2] is not None else None
    found = [share for share in (_slurm(environment, count), *_indexed(environment, count)) if share is not None]
    if not found:
        raise UsageError(
            "--part auto reads which task of an array job this is, and no variable says so (SLURM_ARRAY_TASK_ID, "
            f"{', '.join(index for _, index, _, _ in INDEXES)}). Say it as --part I/N."
        )
    if len({share for _, share in found}) > 1:
        said = ", ".join(f"{share} by {engine}" for engine, share in found)
        raise UsageError(f"--part auto finds two engines that disagree: {said}. Say it as --part I/N.")
    return found[0][1]


def _slurm(environment: Mapping[str, str], count: int | None) -> tuple[str, Share] | None:
    """Of a whole array only: where some tasks are started again by themselves, their count is another one."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    task, least, most, tasks = (
        _number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT")
    )
    step = (most - least) // (tasks - 1) if tasks > 1 else 1
    is_regular = tasks > 0 and step > 0 and least + step * (tasks - 1) == most and (task - least) % step == 0
    if not is_regular or (count is not None and tasks != count) or (count is None and least > 1):
        raise UsageError(
            f"--part auto is for a whole Slurm array, such as --array=1-7. This one has {tasks} of the tasks {least} "
            f"to {most}, so which part task {task} is cannot be told. Say it: --part $SLURM_ARRAY_TASK_ID/N."
        )
    return "Slurm", Share((task - least) // step + 1, tasks)


def _indexed(environment: Mapping[str, str], count: int | None) -> list[tuple[str, Share]]:
    found = []
    for engine, index, first, total in INDEXES:
        if index not in environment:
            continue
        if total is not None and total in environment:
            told = _number(environment, total)
            if count not in (None, told):
                raise UsageError(f"--part auto/{count} is not what {engine} says: {total} is {told}.")
            found.append((engine, Share(_number(environment, index) - first + 1, told)))
        elif count is not None:
            found.append((engine, Share(_number(environment, index) - first + 1, count)))
        else:
            raise UsageError(f"{engine} does not say how many tasks there are. Say it: --part auto/N.")
    return found


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"\d{1,6}", value, re.ASCII):
        raise UsageError(f"--part auto needs a number in {name}, which holds {value!r}. Say it as --part I/N.")
    return int(value)
