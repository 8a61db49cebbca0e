"""How many CPUs there are for this process."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Those that it may run on, as ``taskset`` or a job's limits leave them; all, where that is not known."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
