"""How far a run is, on stderr: a bar in a terminal, rare plain lines in a log, nothing with ``--quiet``."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qz.cli.output import duration, plain, say, size
from qz.counted import counted

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from qz.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
IMPORTED = time.monotonic()


def since_start() -> float:
    """Seconds since this process began: importing Python and qz counts too."""
    if sys.platform == "linux":
        try:
            with open("/proc/self/stat", "rb") as file:
                ticks = int(file.read().rpartition(b")")[2].split()[19])
            return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            pass
    return time.monotonic() - IMPORTED


def timed(summary: Any) -> Any:
    """``summary`` with the seconds since the command started; an output that was there already took none."""
    from dataclasses import replace

    made = getattr(summary, "seconds", 0) and not summary.dry_run
    return replace(summary, seconds=since_start()) if made else summary


class Display:
    """A callback for the core, safe to call from any thread. A context manager: the bar goes away with the run.

    One bar at a time: what is done next (``Progress.doing``) takes the place of what was done before.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.lock = threading.Lock()
        self.doing = ""
        self.told = False
        self.started = time.monotonic()
        self.first_bytes: int | None = None
        self.last_line = self.started
        self.last: Progress | None = None
        """In a log, the step that is not reported yet, once one was."""
        self.bar: RichProgress | None = None
        self.task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            from qz.formats.output.storage.signals import defer_signals

            with defer_signals():  # an interrupt must not leave half of a bar and a hidden cursor behind
                self.bar.stop()
        elif error is None and self.last is not None and self.first_bytes is not None:
            self.write(self.last)

    def __call__(self, step: Progress) -> None:
        if self.quiet:
            return
        with self.lock:
            if step.doing != self.doing:
                self.begin(step.doing)
        if step.kept is not None:
            kept, of = step.kept
            rest = f", and {size(step.kept_bytes)} of the rest" if step.kept_bytes else ""
            what = step.unit if step.unit in ("block", "step", "weight") else "shard"
            done = f"{kept} of {counted(of, what)}" if of else counted(kept, what)
            self.tell(f"Continuing: {done} {'is' if (of or kept) == 1 else 'are'} done{rest}.")
        if self.bar is not None:
            count = f"{step.done}/{step.total} {step.unit}s" if step.total else counted(step.done, step.unit)
            in_bytes = bool(step.bytes or step.all_bytes or not step.done)
            how_far, total = (step.bytes, step.all_bytes) if in_bytes else (step.done, step.total)
            count = count if step.done or step.total else ""
            self.bar.update(self.task, completed=how_far, total=total or None, count=count, in_bytes=in_bytes)
            return
        with self.lock:
            self.line(step)

    def begin(self, doing: str) -> None:
        """Start a new bar; in a log, start the clock again."""
        self.doing, self.first_bytes, self.told, self.last = doing, None, False, None
        self.started = self.last_line = time.monotonic()
        if not sys.stderr.isatty():
            return
        if self.bar is None:
            self.bar = bar()
            try:
                self.bar.start()
            except BaseException:  # an early interrupt must not leave a bar and a hidden cursor behind
                self.bar.stop()
                raise
        else:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(doing, total=None, count="", in_bytes=True)

    def tell(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False)
        else:
            say(text)

    def line(self, step: Progress) -> None:
        """A line when a shard is finished, and every ten seconds between."""
        now = time.monotonic()
        if self.first_bytes is None:
            # Not from zero: a resumed run begins in the middle.
            self.first_bytes, self.started = step.bytes, now
        if step.file is None and now - self.last_line < SECONDS_BETWEEN_LINES:
            self.last = step if self.told else None
            return
        self.last_line, self.told, self.last = now, True, None
        self.write(step)

    def write(self, step: Progress) -> None:
        """How far a run is, as a line."""
        now = time.monotonic()
        if not step.all_bytes and not step.total:  # the total is not known yet
            say(f"{step.doing}: {counted(step.done, step.unit)} …" if step.done else f"{step.doing} …")
            return
        parts = [f"{size(step.bytes)} of {size(step.all_bytes)}"] if step.all_bytes else []
        if step.total:
            parts.append(f"{step.unit} {step.done} of {step.total}")
        elapsed, moved = now - self.started, step.bytes - (self.first_bytes or 0)
        if elapsed > 1 and moved > 0:
            parts.append(f"{size(moved / elapsed)}/s")
            if left := step.all_bytes - step.bytes:
                parts.append(f"{duration(left * elapsed / moved)} left")
        if step.file is not None:
            parts.append(f"{plain(step.file)} {'sent' if step.doing == 'Uploading' else 'written'}")
        say(f"{step.doing}: {', '.join(parts)}")


def bar() -> RichProgress:
    """Rich's bar with as many figures beside it as the terminal has room for."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Amount(DownloadColumn):
        """What is counted in bytes, or else in blocks, steps …"""

        def render(self, task: Any) -> Text:
            return super().render(task) if task.fields["in_bytes"] else Text(task.fields["count"], "progress.download")

    class Speed(TransferSpeedColumn):
        def render(self, task: Any) -> Text:
            return super().render(task) if task.fields["in_bytes"] else Text()

    class Count(TextColumn):
        """Things counted beside the bytes."""

        def render(self, task: Any) -> Text:
            return super().render(task) if task.fields["in_bytes"] else Text()

    columns: list[Any] = [BarColumn(bar_width=None), TaskProgressColumn()]
    width = shutil.get_terminal_size().columns
    if width >= 60:
        columns = [TextColumn("{task.description}", markup=False), *columns, Amount()]
    if width >= 80:
        columns.append(Speed())
    if width >= 100:
        columns.append(Count("{task.fields[count]}", markup=False))
    columns.append(TimeRemainingColumn(compact=True))
    return RichProgress(*columns, console=Console(stderr=True, highlight=False), transient=True, expand=True)
