"""Anonymous memory (RssAnon) of a command and of the processes that it starts: the files that they map do not count."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Peak:
    """Bytes, as far as ``look`` saw: of the largest process, and of all together, in which a page that a fork shares
    counts twice."""

    largest: int = 0
    together: int = 0

    def look(self, pid: int) -> None:
        sizes = [anonymous(each) for each in (pid, *below(pid))]
        self.largest, self.together = max(self.largest, *sizes), max(self.together, sum(sizes))


def anonymous(pid: int) -> int:
    """0 if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def below(pid: int) -> list[int]:
    """The processes that it has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return [*found, *(each for child in found for each in below(child))]
