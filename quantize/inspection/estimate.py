"""What quantizing would give, in bytes on disk and in memory, from headers alone and without a library's code.

Which tensors are linear layers is the rule's guess (``linear_layers``); what each of them becomes is exact, and so is
the header in front of them while they fit in one file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from qz.formats.tensors.safetensors import BITS
from qz.formats.tensors.shards import DEFAULT_SHARD_BYTES
from qz.quantize.inspection.linear_layers import TORCH_NAMES, Value
from qz.quantize.methods import FourBit, Int8, Method, Part

if TYPE_CHECKING:
    from qz.formats.checkpoint.weights import Library

METHODS: dict[str, Method] = {
    "nf4": FourBit("nf4"),
    "nf4_double_quant": FourBit("nf4", double_quant=True),
    "fp4": FourBit("fp4"),
    "int8": Int8(),
}
MEASURED = 10_000
"""Of so many tensors the headers are laid out to know their length; of more, it is taken from these."""
_RANK = {dtype: -place for place, dtype in enumerate(BITS)}
_AROUND = len(',"":{"dtype":"","shape":[],"data_offsets":[,]}')


class Estimate(NamedTuple):
    """What a method would give. ``bytes``: of the weight files; with double quantization up to 25 a weight too many.

    ``exact``: the model's library was asked; otherwise its names and shapes were.
    """

    bytes: int
    memory_footprint: int
    quantized_parameters: int
    exact: bool = False


_Stored = tuple[str, Part, int, int]
"""A tensor of the output: its name, dtype and shape, bytes, and the number of the tensor that it was made from."""


def estimate(values: Sequence[Value], method: Method, library: Library) -> Estimate:
    """What the model would be with ``method``, the library's default skips, and shards of the default size."""
    return _estimate(values, _Summary.of(values), method, library)


class _Summary(NamedTuple):
    """What is the same for all methods: ``kept`` bytes, and how many weights would be quantized by shape and dtype."""

    kept: int
    linear: Mapping[tuple[tuple[int, ...], str], int]

    @classmethod
    def of(cls, values: Sequence[Value]) -> _Summary:
        kept = sum(value.nbytes for value in values if not value.linear)
        return cls(kept, Counter((value.shape, value.dtype) for value in values if value.linear))


def _estimate(values: Sequence[Value], summary: _Summary, method: Method, library: Library) -> Estimate:
    total = footprint = summary.kept
    quantized = 0
    alike: dict[tuple[tuple[int, ...], str], list[tuple[Part, int]]] = {}
    for (shape, dtype), times in summary.linear.items():
        parts = [(part, part.nbytes) for part in method.parts(shape, TORCH_NAMES[dtype])]
        alike[shape, dtype] = parts
        count = math.prod(shape)
        total += times * sum(nbytes for _, nbytes in parts)
        footprint += times * method.footprint(count)
        quantized += times * count
    sample = values if len(values) <= MEASURED else values[:: len(values) // MEASURED + 1]
    stored: list[_Stored] = []
    for number, value in enumerate(sample):
        if value.linear:
            path = value.name.removesuffix("weight")
            stored += [(path + part.suffix, part, nbytes, number) for part, nbytes in alike[value.shape, value.dtype]]
        else:
            stored.append((value.name, Part("", value.dtype, value.shape), value.nbytes, number))
    headers = _headers(stored, total, library) * len(values) // len(sample) if sample else _headers([], 0, library)
    return Estimate(total + headers, footprint, quantized)


def estimates(values: Sequence[Value], library: Library) -> dict[str, Estimate]:
    """By every method. The two 4-bit types differ in codes and in the letters of their names, in no length."""
    summary = _Summary.of(values)
    found = {name: _estimate(values, summary, METHODS[name], library) for name in ("nf4", "nf4_double_quant", "int8")}
    return {name: found[name if name in found else "nf4"] for name in METHODS}


def _headers(stored: Sequence[_Stored], total: int, library: Library) -> int:
    """Bytes of all headers. Those of several files may be a few bytes off: each library has an order of its own."""
    return (
        sum(map(_header, _split(stored, together=library == "diffusers")))
        if total > DEFAULT_SHARD_BYTES
        else _header(stored)
    )


def _split(stored: Sequence[_Stored], *, together: bool) -> Iterator[list[_Stored]]:
    """Shards of at most ``DEFAULT_SHARD_BYTES``, a quantized weight and what belongs to it ``together`` or not."""
    current: list[_Stored] = []
    size, last = 0, -1
    for each in stored:
        if size + each[2] > DEFAULT_SHARD_BYTES and current and not (together and each[3] == last):
            yield current
            current, size = [], 0
        current.append(each)
        size, last = size + each[2], each[3]
    yield current


def _header(tensors: Iterable[_Stored]) -> int:
    """The length that ``encode_header`` gives them in ``plan.shard_layout``'s order: those of variable length last."""
    length = len('{"__metadata__":{"format":"pt"}}')
    position = 0
    for name, part, nbytes, _ in sorted(tensors, key=lambda each: (each[1].variable, _RANK[each[1].dtype], each[0])):
        rank = len(part.shape)
        shape = len(str(part.shape)) - rank - 1 - (rank == 1) if rank else 0  # without brackets and spaces
        length += len(name) + len(part.dtype) + shape + len(f"{position}{position + nbytes}") + _AROUND
        if not name.isascii() or '"' in name or "\\" in name:
            length += len(name.encode()) - len(name) + name.count('"') + name.count("\\")
        position += nbytes
    return 8 + length + -length % 8
