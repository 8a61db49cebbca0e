"""The level nearest to each lane by AVX-512's lookups in registers: nine instructions for what takes thirty.

The range of the values is cut into 32 cells, each with at most one bound between two levels. A lane's cell says which
bound that is, and the levels below and above it. What is found is what comparing with all bounds finds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from qz.quantize.compute import tables
from qz.quantize.compute.cpu.llvm_vectors import I16, I32, same, vector

_FLOAT = ir.FloatType()
_NEEDED = frozenset({"+avx512f", "+avx512bw"})


def usable(context: Any) -> bool:
    """Whether numba compiles for a processor that has them."""
    _, _, features = context.codegen().magic_tuple()
    return set(features.split(",")) >= _NEEDED


@dataclass(frozen=True, slots=True)
class Cells:
    """By the low five bits of a cell's number: its bound, and the positions among the levels below and above it."""

    bounds: list[float]
    below: list[int]
    above: list[int]


def _cells(levels: list[Any], bounds: list[Any], edge: Callable[[int], float], beyond: float) -> Cells:
    """Cells from −16 to 15, each from ``edge`` of its number to that of the next; below and above them is no end."""
    found = Cells([], [], [])
    for number in (*range(16), *range(-16, 0)):
        first = bisect_left(bounds, edge(number)) if number > -16 else 0
        last = bisect_left(bounds, edge(number + 1)) if number < 15 else len(bounds)
        inside = [k for k in range(first, last) if levels[k] != levels[k + 1]]
        if len(inside) > 1:
            raise ValueError(f"cell {number} has {len(inside)} bounds")
        found.bounds.append(bounds[inside[0]] if inside else beyond)
        found.below.append(first)
        found.above.append(last)
    return found


def float_cells(quant_type: str) -> Cells:
    """Of a sixteenth. Adding 192 to a float32 rounds up what lies less than 2⁻¹⁷ below an edge."""
    levels = tables.QUANT_MAPS[quant_type][tables.order(quant_type)].tolist()
    return _cells(levels, tables.bounds(quant_type).tolist(), lambda number: number / 16 - 2**-17, float("inf"))


def coarse_cells(bounds: list[int], levels: list[int]) -> Cells:
    """Of 256 steps of ``scale_search.GRID``."""
    return _cells(levels, bounds, lambda number: number * 256, 32767)


def positions(builder: Any, values: Any, quant_type: str) -> Any:
    """int32 of 64 lanes: how many bounds each value is above, but for bounds between equal levels."""
    cells = float_cells(quant_type)
    found = []
    for part in _split(builder, values, 16):
        index = _float_index(builder, part)
        is_above = builder.fcmp_ordered(">", part, _lookup(builder, _FLOAT, cells.bounds, index))
        below = _lookup(builder, I32, cells.below, index)
        found.append(builder.select(is_above, _lookup(builder, I32, cells.above, index), below))
    return _joined(builder, found)


def levels_at(builder: Any, found: Any, quant_type: str) -> Any:
    """float32 of 64 lanes, of ``positions``."""
    levels = tables.QUANT_MAPS[quant_type][tables.order(quant_type)].tolist()
    table = ir.Constant(vector(_FLOAT, 16), levels)
    chosen = [_call(builder, "llvm.x86.avx512.permvar.sf.512", [table, part]) for part in _split(builder, found, 16)]
    return _joined(builder, chosen)


def levels(builder: Any, values: Any, quant_type: str) -> Any:
    """float32 of 64 lanes: the levels nearest to ``values``."""
    return levels_at(builder, positions(builder, values, quant_type), quant_type)


def coarse_index(builder: Any, whole: Any) -> list[Any]:
    """The cells of 64 int16 from −4096 to 4096, in two parts."""
    most = same(I16, 4095)
    return _split(
        builder, builder.ashr(builder.select(builder.icmp_signed("<", whole, most), whole, most), same(I16, 8)), 32
    )


def coarse_levels(builder: Any, whole: Any, index: list[Any], bounds: list[int], levels: list[int]) -> Any:
    """int16 of 64 lanes: the levels of values in these cells."""
    cells, found = coarse_cells(bounds, levels), []

    def looked_up(values: list[Any], at: Any) -> Any:
        table = ir.Constant(vector(I16, 32), values)
        return _call(builder, "llvm.x86.avx512.permvar.hi.512", [table, at])

    for part, at in zip(_split(builder, whole, 32), index, strict=True):
        is_above = builder.icmp_signed(">", part, looked_up(cells.bounds, at))
        below, above = (looked_up([levels[k] for k in which], at) for which in (cells.below, cells.above))
        found.append(builder.select(is_above, above, below))
    return _joined(builder, found)


def _float_index(builder: Any, part: Any) -> Any:
    """The cells of 16 values; NaN's is the lowest."""
    least, most = same(_FLOAT, -1.0, 16), same(_FLOAT, 0.96875, 16)
    part = builder.select(builder.fcmp_ordered(">", part, least), part, least)
    part = builder.select(builder.fcmp_ordered("<", part, most), part, most)
    moved = builder.bitcast(builder.fadd(part, same(_FLOAT, 192.0, 16)), vector(I32, 16))
    return builder.lshr(moved, same(I32, 12, 16))


def _lookup(builder: Any, element: Any, values: list[Any], index: Any) -> Any:
    """Of 32 values, by the low five bits."""
    halves = [ir.Constant(vector(element, 16), values[:16]), ir.Constant(vector(element, 16), values[16:])]
    kind = "ps" if element is _FLOAT else "d"
    return _call(builder, f"llvm.x86.avx512.vpermi2var.{kind}.512", [halves[0], index, halves[1]])


def _call(builder: Any, name: str, arguments: list[Any]) -> Any:
    """A processor's own operation whose result is like its first argument."""
    function = builder.module.globals.get(name)
    if function is None:
        kinds = [each.type for each in arguments]
        function = ir.Function(builder.module, ir.FunctionType(kinds[0], kinds), name)
    return builder.call(function, arguments)


def _split(builder: Any, lanes: Any, size: int) -> list[Any]:
    starts = range(0, lanes.type.count, size)
    return [
        builder.shuffle_vector(lanes, lanes, ir.Constant(vector(I32, size), list(range(start, start + size))))
        for start in starts
    ]


def _joined(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        both = ir.Constant(vector(I32, count), list(range(count)))
        parts = [builder.shuffle_vector(*pair, both) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
