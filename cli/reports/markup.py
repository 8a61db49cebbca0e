"""A report as one HTML page that needs nothing else: tables, and charts as SVG; no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from qz import __version__
from qz.cli.output import Column, plain
from qz.redaction import redact

WIDTH, ROW, LABEL, FIGURE = 720, 26, 150, 90
"""Of a chart: in pixels where the page is wide enough, of one bar, of its label and of its figure."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --soft: #5a6372; --line: #d7dce4; --ground: #ffffff; --bar: #2f66b0;
  --other: #9aa6b8 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ef; --soft: #a5afbf; --line: #3a4352; --ground: #14181f;
  --bar: #7fb0f0; --other: #5b6678 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground); max-width: 60rem;
  margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
p, figcaption { color: var(--soft); margin: .25rem 0 .75rem } figure { margin: 0 0 1rem; overflow-x: auto }
.wide { overflow-x: auto } .wide:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600; white-space: nowrap } .wide td:is(:first-child, :last-child) { min-width: 9rem }
.right { text-align: right; white-space: nowrap }
svg { width: 100%; min-width: 30rem; height: auto; display: block }
svg text { font: 13px system-ui, sans-serif; fill: var(--text) }
.bar { fill: var(--bar) } .other { fill: var(--other) } footer { margin-top: 3rem; color: var(--soft) }
@media print { :root { --text: #000; --soft: #444; --ground: #fff; --line: #bbb; --bar: #2f66b0; --other: #9aa6b8 }
  body { max-width: none; padding: 0 } .wide, figure { overflow: visible } svg { min-width: 0 }
  tr, figure { break-inside: avoid }
  thead { display: table-header-group } }
"""


class Markup(str):
    """Text that is HTML already. Every other value is text of the reader's files, and is escaped."""

    __slots__ = ()


def text(value: object) -> Markup:
    """``value`` as HTML shows it word for word."""
    return value if isinstance(value, Markup) else Markup(escape(redact(plain(str(value)))))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. ``class_`` is the attribute ``class``, and other underscores are hyphens."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{told}>{''.join(map(text, children))}</{name}>")


def page(title: str, *parts: Markup) -> str:
    """The whole document."""
    policy = Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        policy,
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta name="generator" content="qz {__version__}">'),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", tag("h1", title), *parts), tag("footer", f"Written by qz {__version__}."))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, *parts: Markup) -> Markup:
    """Parts under a heading."""
    return tag("section", tag("h2", title), *parts)


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Labels and values."""
    return tag("table", *(tag("tr", tag("th", label, scope="row"), tag("td", value)) for label, value in rows))


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[object]]) -> Markup:
    """Rows under their titles; where the window is narrower, the table can be scrolled, with the keyboard too."""
    sides = [{"class_": "right"} if column.right else {} for column in columns]
    head = (tag("th", column.title, scope="col", **side) for column, side in zip(columns, sides, strict=True))
    body = (tag("tr", *(tag("td", cell, **side) for cell, side in zip(row, sides, strict=True))) for row in rows)
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return tag("div", whole, class_="wide", tabindex=0, role="region", aria_label=caption)


def chart(caption: str, bars: Sequence[tuple[str, float, str]]) -> Markup:
    """A horizontal bar for each label and value ≥ 0, with a figure behind it."""
    most = max((value for _, value, _ in bars), default=0.0) or 1.0
    room = WIDTH - LABEL - FIGURE
    parts = [tag("title", caption)]
    for number, (label, value, figure) in enumerate(bars):
        y, long = number * ROW, room * value / most
        shown = label if len(label) <= 20 else f"…{label[-19:]}"
        parts += [
            tag("text", shown, tag("title", label), x=LABEL - 8, y=y + 17, text_anchor="end"),
            tag("rect", class_="bar", x=LABEL, y=y + 4, width=f"{long:.1f}", height=ROW - 8, rx=2),
            tag("text", figure, x=f"{LABEL + long + 6:.1f}", y=y + 17),
        ]
    drawn = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {max(len(bars), 1) * ROW}", role="img")
    return tag("figure", tag("figcaption", caption), drawn)


def columns(caption: str, bars: Sequence[tuple[str, float]]) -> Markup:
    """A narrow upright bar for each of many values ≥ 0, in their order; the table below the chart has the figures."""
    high, left = 160, 56
    most = max((value for _, value in bars), default=0.0) or 1.0
    step = (WIDTH - left) / max(len(bars), 1)
    parts = [tag("title", caption)]
    for share in (0.0, 0.5, 1.0):
        y = 10 + high * (1 - share)
        parts.append(tag("rect", class_="other", x=left, y=f"{y:.1f}", width=WIDTH - left, height=0.5))
        parts.append(tag("text", f"{most * share:.2g}", x=left - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for number, (label, value) in enumerate(bars):
        tall = high * value / most
        place = {"x": f"{left + (number + 0.1) * step:.2f}", "y": f"{10 + high - tall:.2f}"}
        told = tag("title", f"{label}: {value:.4g}")
        parts.append(tag("rect", told, class_="bar", **place, width=f"{0.8 * step:.2f}", height=f"{tall:.2f}"))
    drawn = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {high + 20}", role="img")
    return tag("figure", tag("figcaption", caption), drawn)
