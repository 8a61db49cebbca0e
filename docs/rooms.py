"""The picture of the rooms for the architecture page, drawn from the imports of the code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean

import grimp
import networkx

ROOMS = ("quantize", "formats")
GAP, ROW, BOX = 18, 56, 26
"""Pixels between boxes, from row to row, and of a box's height."""
COLOURS = {"quantize": "#fff3cd", "formats": "#d7e9f7"}
STYLE = """<style>
svg { background: #fff; font: 12px monospace; text-anchor: middle }
rect { stroke: #78909c }
path { fill: none; stroke: #90a4ae }
#head path { fill: #90a4ae; stroke: none }
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0L8 4L0 8z"/></marker></defs>"""


def picture() -> str:
    """An SVG: every room, and an arrow for each import between two that no longer way implies.

    What lies in ``quantize`` or ``formats`` itself is two boxes: what stands on the rooms inside, and what they stand
    on.
    """
    imports = grimp.build_graph("qz", exclude_type_checking_imports=True, cache_dir=None)

    def names(room: str, modules: Iterable[str], depth: int = 3) -> set[str]:
        """What of ``modules`` lies in ``room``, at least ``depth`` deep: by its name there."""
        parts = [module.split(".") for module in modules if module.startswith(f"qz.{room}.")]
        return {part[2] for part in parts if len(part) >= depth}

    inside = {room: names(room, imports.modules, depth=4) for room in ROOMS}

    def box(module: str) -> str:
        """``quantize/planning``, ``quantize/…``, ``formats/base``, ``cli``, ``api``."""
        _, room, *rest = module.split(".")
        if room not in ROOMS or not rest:
            return room
        if rest[0] in inside[room]:
            return f"{room}/{rest[0]}"
        needed = names(room, imports.find_upstream_modules(module))
        return f"{room}/entry" if needed & inside[room] else f"{room}/base"

    boxes = {module: box(module) for module in imports.modules if "." in module and "__main__" not in module}
    graph = networkx.DiGraph(
        (boxes[one], boxes[other])
        for one in boxes
        for other in imports.find_modules_directly_imported_by(one)
        if other in boxes and boxes[one] != boxes[other] and boxes[other] not in ROOMS
    )
    return svg(networkx.transitive_reduction(graph))


def svg(graph: networkx.DiGraph[str]) -> str:
    """The graph in rows, each below all that import it; arrows that pass rows have a place of their own in them."""
    rows, paths = placed(graph)
    widths = {name: 16 + 7 * len(name) if name in graph else 14 for row in rows for name in row}
    lengths = [sum(widths[name] + GAP for name in row) - GAP for row in rows]
    width, height = max(lengths) + 2 * GAP, len(rows) * ROW + GAP
    at: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        x = (width - lengths[number]) / 2
        for name in row:
            at[name] = (x + widths[name] / 2, GAP + number * ROW + BOX / 2)
            x += widths[name] + GAP
    arrows = [f'<path d="{line([at[name] for name in path])}" marker-end="url(#head)"/>' for path in paths]
    boxes = [
        f'<rect x="{x - widths[name] / 2:g}" y="{y - BOX / 2:g}" width="{widths[name]}" height="{BOX}" rx="4" '
        f'fill="{COLOURS.get(name.partition("/")[0], "#eceff1")}"/>\n'
        f'<text x="{x:g}" y="{y + 4:g}">{name}</text>'
        for name, (x, y) in sorted(at.items())
        if name in graph
    ]
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, STYLE, *arrows, *boxes, "</svg>"]) + "\n"


def placed(graph: networkx.DiGraph[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows from top to bottom, ordered so that few arrows cross, and each arrow as the places that it passes."""
    rows = [sorted(each) for each in networkx.topological_generations(graph)]
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    paths = []
    for one, other in sorted(graph.edges):
        between = [f"{one}>{other}@{number}" for number in range(row_of[one] + 1, row_of[other])]
        for number, name in enumerate(between, row_of[one] + 1):
            rows[number].append(name)
        paths.append([one, *between, other])
    near: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for row in rows for name in row}
    for path in paths:
        for upper, lower in pairwise(path):
            near[upper][1].append(lower)
            near[lower][0].append(upper)
    for sweep in range(24):
        side = sweep % 2
        for row in reversed(rows) if side else rows:
            places = {name: (n + 0.5) / len(each) for each in rows for n, name in enumerate(each)}
            mean = {name: fmean(map(places.__getitem__, near[name][side] or [name])) for name in row}
            row.sort(key=mean.__getitem__)
    return rows, paths


def line(points: Sequence[tuple[float, float]]) -> str:
    """From the lower edge of the first box to the upper edge of the last one, curved in between."""
    (x, y), *rest = points
    y += BOX / 2
    drawn = f"M{x:g} {y:g}"
    for number, (right, below) in enumerate(rest, 1):
        end = below - (BOX / 2 + 3 if number == len(rest) else 0)
        half = (y + end) / 2
        drawn += f"C{x:g} {half:g} {right:g} {half:g} {right:g} {end:g}"
        x, y = right, end
    return drawn
