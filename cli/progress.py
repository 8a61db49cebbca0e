"""How far a run is, on stderr: a bar in a terminal, rare plain lines in a log, nothing with ``--quiet``."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from qz.cli.output import duration, plain, say, size

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0


class Step(Protocol):
    """How far the core is: weights and bytes of the source done, of how many."""

    @property
    def weights(self) -> int: ...
    @property
    def all_weights(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def all_bytes(self) -> int: ...
    @property
    def shard(self) -> str | None:
        """One that was just finished."""
        ...

    @property
    def kept(self) -> tuple[int, int] | None:
        """Files that an interrupted run had finished, of how many; told once."""
        ...


class Display:
    """A callback for the core, safe to call from any thread. A context manager: the bar goes away with the run."""

    def __init__(self, doing: str, *, unit: str = "tensor", quiet: bool = False) -> None:
        """``doing`` says what is going on, in a word: ``Quantizing``. ``unit`` is what is counted, as the core does."""
        self.doing = doing
        self.unit = unit
        self.quiet = quiet
        self.lock = threading.Lock()
        self.started = time.monotonic()
        self.first_bytes: int | None = None
        self.last_line = self.started
        self.bar: Progress | None = None
        self.task: Any = None

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            self.bar = bar()
            self.task = self.bar.add_task(self.doing, total=None, count="")
            try:
                self.bar.start()
            except BaseException:  # an interrupt that comes early must not leave a bar, and no cursor
                self.bar.stop()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, step: Step) -> None:
        if self.quiet:
            return
        if step.kept is not None:
            self.tell(f"Continuing: {step.kept[0]} of {step.kept[1]} shards are done.")
        if self.bar is not None:
            count = f"{step.weights}/{step.all_weights} {self.unit}s"
            self.bar.update(self.task, completed=step.bytes, total=step.all_bytes, count=count)
            return
        with self.lock:
            self.line(step)

    def tell(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False)
        else:
            say(text)

    def line(self, step: Step) -> None:
        """A line when a shard is finished, and every ten seconds between."""
        now = time.monotonic()
        if self.first_bytes is None:
            # Not from zero: a resumed run begins in the middle.
            self.first_bytes, self.started = step.bytes, now
        if step.shard is None and now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        parts = [f"{self.doing}: {size(step.bytes)} of {size(step.all_bytes)}"]
        parts.append(f"{self.unit} {step.weights} of {step.all_weights}")
        elapsed, moved = now - self.started, step.bytes - self.first_bytes
        if elapsed > 1 and moved > 0:
            parts.append(f"{size(moved / elapsed)}/s")
            if left := step.all_bytes - step.bytes:
                parts.append(f"{duration(left * elapsed / moved)} left")
        if step.shard is not None:
            parts.append(f"{plain(step.shard)} written")
        say(", ".join(parts))


def bar() -> Progress:
    """Rich's bar with as many figures beside it as the terminal has room for."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[Any] = [BarColumn(bar_width=None), TaskProgressColumn()]
    width = shutil.get_terminal_size().columns
    if width >= 60:
        columns = [TextColumn("{task.description}", markup=False), *columns, DownloadColumn()]
    if width >= 80:
        columns.append(TransferSpeedColumn())
    if width >= 100:
        columns.append(TextColumn("{task.fields[count]}", markup=False))
    columns.append(TimeRemainingColumn(compact=True))
    return Progress(*columns, console=Console(stderr=True, highlight=False), transient=True, expand=True)
