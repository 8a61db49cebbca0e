"""What quantizing would give, in bytes on disk and in memory, from headers alone and without a library's code.

Which tensors are linear layers is the rule's guess (``structure.py``); what each of them becomes, and what the headers
in front of them take, is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qz.formats import shards
from qz.formats.safetensors import BITS, encode_header, layout
from qz.quantize.methods import FourBit, Int8, Method, Part
from qz.quantize.structure import TORCH_NAMES, Value

if TYPE_CHECKING:
    from qz.formats.weights import Library

METHODS: dict[str, Method] = {
    "nf4": FourBit("nf4"),
    "nf4_double_quant": FourBit("nf4", double_quant=True),
    "fp4": FourBit("fp4"),
    "int8": Int8(),
}
MAX_SHARD_BYTES = 5 * 10**9
MEASURED = 8_000
"""Of so many tensors the headers are laid out to know their length; of more, it is taken from these."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a method would give. ``bytes``: of the weight files; with double quantization up to 25 a weight too many.

    ``exact``: the model's library was asked; otherwise its names and shapes were.
    """

    bytes: int
    memory_footprint: int
    quantized_parameters: int
    exact: bool = False


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the output."""

    name: str
    part: Part
    nbytes: int
    group: int


def estimate(values: Sequence[Value], method: Method, library: Library) -> Estimate:
    """What the model would be, quantized with ``method`` under the library's default skips, in shards of 5 GB."""
    stored: list[_Stored] = []
    footprint = quantized = 0
    alike: dict[tuple[tuple[int, ...], str], tuple[Part, ...]] = {}
    for number, value in enumerate(values):
        if not value.linear:
            footprint += value.nbytes
            stored.append(_Stored(value.name, Part("", value.dtype, value.shape), value.nbytes, number))
            continue
        footprint += method.footprint(value.count)
        quantized += value.count
        key = (value.shape, value.dtype)
        if key not in alike:
            alike[key] = method.parts(value.shape, TORCH_NAMES[value.dtype])
        path = value.name.removesuffix("weight")
        stored += (_Stored(path + part.suffix, part, _nbytes(part), number) for part in alike[key])
    total = sum(each.nbytes for each in stored)
    return Estimate(total + _headers(stored, library), footprint, quantized)


def unquantized(values: Sequence[Value], library: Library) -> Estimate:
    """The same model as it is loaded, without quantization."""
    return estimate([replace(value, linear=False) for value in values], METHODS["nf4"], library)


def _nbytes(part: Part) -> int:
    bits = BITS[part.dtype]
    for length in part.shape:
        bits *= length
    return bits // 8


def _headers(stored: Sequence[_Stored], library: Library) -> int:
    """Bytes of all headers: in natural order for transformers, in the file's for diffusers, split as they do it."""
    if len(stored) > MEASURED:
        step = len(stored) // MEASURED + 1
        return _headers(stored[::step], library) * len(stored) // len(stored[::step])
    grouped = library == "diffusers"
    ordered = stored if grouped else sorted(stored, key=lambda each: _natural(each.name))
    items = [
        shards.Item(each.name, each.nbytes, each.group if grouped else place) for place, each in enumerate(ordered)
    ]
    parts = {each.name: each.part for each in stored}
    return sum(_header([(name, parts[name]) for name in names]) for names in shards.split(items, MAX_SHARD_BYTES))


def _header(tensors: Sequence[tuple[str, Part]]) -> int:
    """As ``plan.shard_layout`` lays them out: those of variable length last."""
    placed = layout((name, part.dtype, part.shape) for name, part in tensors if not part.variable)
    end = placed[-1].stop if placed else 0
    last = layout((name, part.dtype, part.shape) for name, part in tensors if part.variable)
    return len(
        encode_header([*placed, *(replace(info, start=info.start + end, stop=info.stop + end) for info in last)])
    )


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """``model.layers.10`` after ``model.layers.9``, nearly as transformers' ``dot_natural_key`` sorts."""
    return [(not part.isdigit(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]
