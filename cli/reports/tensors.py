"""The tensors of a checkpoint as rows: each of them, or those that differ in a layer's number only on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from qz.cli.output import Column, size

if TYPE_CHECKING:
    from qz.quantize.inspection.report import Tensor

COLUMNS = (
    Column("tensor", foldable=True),
    Column("×", right=True),
    Column("dtype"),
    Column("shape"),
    Column("bytes", right=True),
)


def matching(tensors: Iterable[Tensor], pattern: str | None) -> tuple[Tensor, ...]:
    """Those whose whole name the glob matches; all without one. ``*`` matches dots too."""
    if pattern is None:
        return tuple(tensors)
    import fnmatch

    matches = re.compile(fnmatch.translate(pattern)).match
    return tuple(tensor for tensor in tensors if matches(tensor.name))


def single(tensors: Iterable[Tensor]) -> Iterator[tuple[str, ...]]:
    """A row for each, in natural order."""
    for tensor in sorted(tensors, key=lambda tensor: natural_key(tensor.name)):
        yield tensor.name, "1", kind(tensor), shape(tensor), size(tensor.bytes)


def grouped(tensors: Sequence[Tensor]) -> Iterator[tuple[str, ...]]:
    """A row for all that differ in numbers of their path only: ``layers.{0..79}.mlp.up_proj.weight``, 80 of them.

    A bias, and what belongs to a quantized weight, is counted with the weight, and named behind it.
    """
    names = {tensor.name for tensor in tensors}
    belongings: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        owner = owner_of(tensor, names)
        if owner is not None:
            belongings.setdefault(owner, []).append(tensor)
    groups: dict[tuple[tuple[str, ...], str, str, str], list[Tensor]] = {}
    totals: dict[tuple[tuple[str, ...], str, str, str], int] = {}
    for tensor in tensors:
        if owner_of(tensor, names) is not None:
            continue
        own = belongings.get(tensor.name, [])
        path = tuple("#" if part.isdecimal() else part for part in tensor.name.split("."))
        key = path, kind(tensor), shape(tensor), ", ".join(sorted(suffix(tensor.name, each.name) for each in own))
        groups.setdefault(key, []).append(tensor)
        totals[key] = totals.get(key, 0) + tensor.bytes + sum(each.bytes for each in own)
    for key in sorted(groups, key=lambda key: natural_key(groups[key][0].name)):
        path, dtype, extents, more = key
        name = pattern_of(path, [tensor.name for tensor in groups[key]]) + (f" + {more}" if more else "")
        yield name, f"{len(groups[key]):,}", dtype, extents, size(totals[key])


def owner_of(tensor: Tensor, names: AbstractSet[str]) -> str | None:
    """The weight on whose line a tensor is counted."""
    if tensor.part_of in names:
        return tensor.part_of
    weight = f"{tensor.name.removesuffix('bias')}weight"
    return weight if tensor.name.endswith(".bias") and weight in names else None


def kind(tensor: Tensor) -> str:
    """The method of a quantized weight, the dtype of any other tensor."""
    return tensor.quantized or tensor.dtype


def shape(tensor: Tensor) -> str:
    """That of a quantized weight before, if it is known."""
    extents = tensor.original or tensor.shape
    return "×".join(map(str, extents)) or "scalar"


def suffix(owner: str, name: str) -> str:
    """``absmax`` of ``q.weight.absmax``, ``SCB`` of ``q.SCB``, ``quant_state`` without the type behind it."""
    return name.removeprefix(owner).removeprefix(owner.removesuffix("weight")).lstrip(".").partition(".")[0]


def pattern_of(path: Sequence[str], names: Iterable[str]) -> str:
    """One name for all: ``{0..79}`` where a number runs through a range."""
    columns = zip(*([part for part in name.split(".") if part.isdecimal()] for name in names), strict=True)
    numbers = iter([ranges({int(number) for number in column}) for column in columns])
    return ".".join(next(numbers) if part == "#" else part for part in path)


def ranges(numbers: set[int]) -> str:
    """``{0..3,5}``; a single number as it is."""
    ordered = sorted(numbers)
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [
        str(first) if last == first else f"{first},{last}" if last == first + 1 else f"{first}..{last}"
        for first, last in runs
    ]
    if len(shown) > 6:
        shown = [*shown[:3], "…", *shown[-2:]]
    return shown[0] if len(ordered) == 1 else "{" + ",".join(shown) + "}"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A key that puts layer 9 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
