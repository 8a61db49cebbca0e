"""A picture of what each block of a model lost, as SVG, which a model card can show."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qz.cli.output import plain
from qz.counted import counted
from qz.redaction import redact

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 280, 64, 40, 28
FONT = 'font-family="system-ui, sans-serif" font-size="12"'


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """One bar for each value ≥ 0, from left to right; its name and value are shown where the mouse points."""
    most = max((value for _, value in values), default=0.0) or 1.0
    room, high = WIDTH - LEFT - 8, HEIGHT - TOP - BOTTOM
    step = room / max(len(values), 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="8" y="22" {FONT} font-weight="bold" fill="#222222">{_text(title)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        y = TOP + high * (1 - share)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - 8}" y2="{y:.1f}" stroke="#dddddd"/>')
        mark = f"{most * share:.2g}"
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" {FONT} text-anchor="end" fill="#555555">{mark}</text>')
    for number, (name, value) in enumerate(values):
        x, tall = LEFT + number * step, high * value / most
        parts.append(
            f'<rect x="{x + 0.1 * step:.1f}" y="{TOP + high - tall:.1f}" width="{0.8 * step:.1f}" '
            f'height="{tall:.1f}" fill="#3b6fb6"><title>{_text(name)}: {value:.4g}</title></rect>'
        )
    parts.append(
        f'<text x="{LEFT + room / 2:.0f}" y="{HEIGHT - 8}" {FONT} text-anchor="middle" fill="#555555">'
        f"{counted(len(values), 'block')}, from the first to the last</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def _text(value: str) -> str:
    return escape(redact(plain(value)))
