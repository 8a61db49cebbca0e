"""How many CPUs there are for this process."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Those that it may run on, as ``taskset`` or a container's limits leave them; all, where that is not known."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, round(_share(CONTROL_GROUP) or count)))


def _share(group: Path) -> float | None:
    """As many CPUs as the time makes that a control group (v2, v1) gets; None where it has no limit."""
    with suppress(OSError, ValueError):
        most, period = (group / "cpu.max").read_text().split()
        return int(most) / int(period)
    with suppress(OSError, ValueError):
        most, period = ((group / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(most) / int(period) if int(most) > 0 else None
    return None
