"""A picture of what each block of a model lost, or each step of a pipeline, as SVG, which a model card can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qz.cli.reports.markup import text
from qz.counted import counted

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 280, 64, 40, 28
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclass(frozen=True, slots=True)
class Chart:
    """One bar for each value ≥ 0, which stands for a ``noun``, from left to right."""

    title: str
    noun: str
    values: Sequence[tuple[str, float]]


def charts(drawn: Sequence[Chart]) -> str:
    """Charts, one below the other; names and values are shown where the mouse points."""
    high = HEIGHT * len(drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" role="img">',
        f'<rect width="{WIDTH}" height="{high}" fill="#ffffff"/>',
    ]
    for number, chart in enumerate(drawn):
        parts += _bars(chart, HEIGHT * number)
    return "\n".join([*parts, "</svg>", ""])


def _bars(chart: Chart, above: int) -> list[str]:
    """The parts of a chart that begins ``above`` below the top."""
    most = max((value for _, value in chart.values), default=0.0) or 1.0
    room, high, top = WIDTH - LEFT - 8, HEIGHT - TOP - BOTTOM, above + TOP
    step = room / max(len(chart.values), 1)
    parts = [f'<text x="8" y="{above + 22}" {FONT} font-weight="bold" fill="#222222">{text(chart.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = top + high * (1 - share)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 8}" y2="{y:.1f}" stroke="#dddddd"/>')
        mark = f"{most * share:.2g}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" {FONT} text-anchor="end" fill="#555555">{mark}</text>')
    for number, (name, value) in enumerate(chart.values):
        x, tall = LEFT + number * step, high * value / most
        parts.append(
            f'<rect x="{x + 0.1 * step:.1f}" y="{top + high - tall:.1f}" width="{0.8 * step:.1f}" '
            f'height="{tall:.1f}" fill="#3b6fb6"><title>{text(name)}: {value:.4g}</title></rect>'
        )
    parts.append(
        f'<text x="{LEFT + room / 2:.0f}" y="{above + HEIGHT - 8}" {FONT} text-anchor="middle" fill="#555555">'
        f"{counted(len(chart.values), chart.noun)}, from the first to the last</text>"
    )
    return parts
