"""What people and scripts read: the sanitizer, sizes, tables, JSON, Markdown. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import stat
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from qz import IOFailed
from qz.cli.streams import tell
from qz.redaction import redact

AT_ONCE = 1000
"""Elements of a list that become text at a time."""
LONGEST_LINE = 10_000
"""Characters of talk: a name from a file may be longer than a terminal can bear."""
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that steer a terminal or hide: control, format (and bidi), surrogate, private, unassigned."""


def plain(text: str) -> str:
    """``text`` from a file or the network, safe to show on one line: what steers a terminal is spelled out as \\x1b.

    Nothing here is ever parsed as Rich markup, so brackets stay as they are. A leading ``::`` and any ``##[`` are
    broken up too: a line that starts so is a command to the runner of GitHub Actions.
    """
    if not text.isascii() or not text.isprintable():
        text = "".join(spelled(c) if unicodedata.category(c) in UNSEEN else c for c in text)
    if text.lstrip().startswith("::"):
        text = text.replace("::", ":\\x3a", 1)
    return text.replace("##[", "#\\x23[")


def spelled(character: str) -> str:
    """``character`` as Python would escape it."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def size(count: float) -> str:
    """``count`` bytes in decimal units, three digits: ``23.8 GB``."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB")
    power = 0
    value = float(count)
    while value >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    if power == 0:
        return f"{count:.0f} {'byte' if count == 1 else 'bytes'}"
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {units[power]}"


def quantity(count: int) -> str:
    """``count`` parameters, four digits: ``11.90 B``, ``22.71 M``, ``512``."""
    for unit, power in (("T", 12), ("B", 9), ("M", 6), ("k", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return str(count)


def duration(seconds: float) -> str:
    """``seconds`` as people say it: ``0.4 s``, ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def took(seconds: float, device: str, nbytes: int) -> str:
    """The time of a run since the command started, and its rate if it read any bytes of the source."""
    rate = f" ({size(nbytes / seconds)}/s)" if seconds and nbytes else ""
    return f"{duration(seconds)} on {device}{rate}"


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole``, never rounded up to 100 % or down to 0 %."""
    if whole <= 0:
        return "–"
    share = 100 * part / whole
    if 99.95 <= share < 100 or 0 < share < 0.05:
        return f"{min(share, 99.99):.2f} %"
    return f"{share:.1f} %"


def display_width(text: str) -> int:
    """Terminal cells that ``text`` takes: wide East Asian characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in unicodedata.normalize("NFC", text)
    )


class Column(NamedTuple):
    """A table's column. Numbers stand right; the one that may be folded onto several lines is ``foldable``."""

    title: str
    right: bool = False
    foldable: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[object]], width: int | None = None) -> str:
    """Rows under their titles, no wider than ``width`` cells (default: the terminal's; in a pipe, as wide as needed).

    What does not fit is folded, never cut; where even that is too wide, each row becomes a paragraph of its own.
    """
    cells = [[plain(str(cell)) for cell in row] for row in rows]
    limit = terminal_width() if width is None else width
    widths = [max(map(display_width, (c.title, *(r[i] for r in cells)))) for i, c in enumerate(columns)]
    if limit is not None and (excess := sum(widths) + 2 * (len(columns) - 1) - limit) > 0:
        foldable = [i for i, column in enumerate(columns) if column.foldable]
        widest = max(foldable, key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] - excess < 16:
            return paragraphs(columns, cells, limit)
        widths[widest] -= excess
    lines = arranged(columns, [column.title for column in columns], widths)
    for row in cells:
        lines += arranged(columns, row, widths)
    return "\n".join(lines)


def arranged(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of one row, its cells folded to ``widths``."""
    folded = [fold(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for number in range(max(map(len, folded))):
        parts = []
        for column, cell, width in zip(columns, folded, widths, strict=True):
            text = cell[number] if number < len(cell) else ""
            space = " " * (width - display_width(text))
            parts.append(space + text if column.right else text + space)
        lines.append("  ".join(parts).rstrip())
    return lines


def paragraphs(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> str:
    """A table for narrow places: the first cell of each row, and the others under it with their titles."""
    blocks = []
    for row in rows:
        lines = fold(row[0], width)
        for column, cell in zip(columns[1:], row[1:], strict=True):
            lines += ["  " + line for line in fold(f"{column.title}: {cell}", max(width - 2, 8))]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def facts(pairs: Iterable[tuple[str, object]], width: int | None = None) -> str:
    """Labels and values, a line each, the values aligned and folded to ``width`` cells."""
    entries = [(label, plain(str(value))) for label, value in pairs]
    limit = terminal_width() if width is None else width
    margin = max((display_width(label) for label, _ in entries), default=0) + 2
    lines = []
    for label, value in entries:
        room = max((limit or 10**9) - margin, 16)
        first, *rest = fold(value, room)
        lines.append(f"{label}{' ' * (margin - display_width(label))}{first}".rstrip())
        lines += [" " * margin + line for line in rest]
    return "\n".join(lines)


def fold(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` cells, broken at a space, dot, slash or dash where there is one."""
    lines = []
    while display_width(text) > width:
        end, used = 0, 0
        while end < len(text) and (used := used + display_width(text[end])) <= width:
            end += 1
        end = max(end, 1)
        breaks = [m.end() for m in re.finditer(r"[\s./,_-]", text[:end]) if m.end() > end // 2]
        end = breaks[-1] if breaks else end
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]


def terminal_width() -> int | None:
    """Columns of the terminal on stdout; None in a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say(*lines: str, quiet: bool = False) -> None:
    """Talk: each of ``lines`` as one line on stderr, whatever is in it, cut to ``LONGEST_LINE`` characters."""
    if not quiet:
        for line in lines:
            told = redact(plain(line))
            tell((told if len(told) <= LONGEST_LINE else told[: LONGEST_LINE - 1] + "…") + "\n")


def wrapped(line: str) -> list[str]:
    """``line``, in a terminal broken at spaces where it is too long. Secrets go first: a break may hide one."""
    line = redact(plain(line))
    if not sys.stderr.isatty():
        return [line]
    width = max(20, shutil.get_terminal_size().columns)
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [line]


def warn(text: str) -> None:
    """A warning on stderr, also with ``--quiet``."""
    say(*wrapped(f"Warning: {text}"))


def show(value: object, *, as_json: bool, text: str, done: str = "") -> None:
    """One value, two renderings: ``value`` as JSON, or ``text``, whose parts went through the sanitizer already.

    ``done``: what holds although stdout cannot take the report, for the IOFailed that says so.
    """
    try:
        for piece in json_pieces(value) if as_json else (redact(text),):
            sys.stdout.write(piece)
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        told = f"{error.strerror}: the report could not be written to stdout."
        raise IOFailed(f"{told} {done}" if done else f"{told} Send it elsewhere, and run the command again.") from error


def json_pieces(value: object) -> Iterator[str]:
    """``value`` (dataclasses, tuples, paths too) as one JSON object: one line, but indented on a terminal.

    Piece by piece: the text of hundreds of thousands of tensors is never there as a whole.
    """
    if sys.stdout.isatty() or not isinstance(value, Mapping):
        indent = 2 if sys.stdout.isatty() else None
        yield redact(json.dumps(jsonable(value), indent=indent, allow_nan=False))
        return
    before = "{"
    for key, item in value.items():
        yield f"{before}{json.dumps(str(key))}: "
        before = ", "
        if not isinstance(item, list | tuple) or hasattr(item, "_asdict") or len(item) <= AT_ONCE:
            yield redact(json.dumps(jsonable(item), allow_nan=False))
            continue
        for start in range(0, len(item), AT_ONCE):
            batch = redact(json.dumps(jsonable(item[start : start + AT_ONCE]), allow_nan=False))
            yield ("[" if not start else ", ") + batch[1:-1]
        yield "]"
    yield "{}" if before == "{" else "}"


def jsonable(value: object) -> Any:
    """``value`` as JSON knows it. Numbers that JSON does not know become null, sets are sorted."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [jsonable(item) for item in sorted(value)]
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def markdown(text: object) -> str:
    """``text`` as it reads in a Markdown table's cell: nothing in it is a link, an image, HTML or a cell's border."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~$@])", r"\\\1", plain(str(text)))


def markdown_table(columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> str:
    """Rows under their titles, as a table in GitHub's Markdown."""
    lines = ["| " + " | ".join(markdown(column.title) for column in columns) + " |"]
    lines.append("| " + " | ".join("---:" if column.right else "---" for column in columns) + " |")
    lines += ["| " + " | ".join(markdown(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


class Section(NamedTuple):
    """A part of a report: a table, or labels and values where there are no columns."""

    rows: Sequence[tuple[str, ...]]
    columns: Sequence[Column] = ()

    def text(self) -> str:
        return table(self.columns, self.rows) if self.columns else facts((label, value) for label, value in self.rows)

    def markdown(self) -> str:
        return markdown_table(self.columns or (Column(""), Column("")), self.rows)


def write_step_summary(text: str) -> None:
    """Append Markdown to the summary page of a GitHub Actions job, where there is one. Never fails a run."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # never wait for a FIFO
    try:
        with open(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="backslashreplace") as summary:
            if not stat.S_ISREG(os.fstat(summary.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            summary.write(redact(text) + "\n\n")
    except OSError as error:
        warn(f"the summary was not written to {path}: {error.strerror}.")
