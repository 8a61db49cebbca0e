"""Tensors of a single file that are stored in another form than their values, in the names of diffusers.

Of GGUF's blocks and 8-bit floats with scales, parts are cut out as they are stored, and put together as values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qz import Unsupported
from qz.formats.checkpoint.gguf import in_blocks
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import CODES, SCALE, Decoded, StoredTensor
from qz.formats.tensors.encodings import Blocks, Grid, Pieces

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qz.quantize.libraries.diffusers.tracing import Converted, View


def put_together(name: str, converted: Converted, tensors: Mapping[str, StoredTensor | Decoded], where: str) -> Decoded:
    """A tensor of the model, put together from ``tensors`` as ``converted`` says; Unsupported for parts of blocks."""
    if not isinstance(converted.content, tuple):
        view: Any = converted.content
        return _arranged(name, converted.shape, view, tensors[view.source], where)
    found: list[Decoded] = []
    for piece in converted.content:
        part = _cut(_in_codes(tensors[piece.source]), piece.start, piece.count)
        if part is None:
            raise Unsupported(
                f"{where}: {quoted(name)} is a part of {quoted(piece.source)} that does not begin and end with a block "
                "of values that are stored together. Use the original weights."
            )
        found.append(part)
    if len(found) > 1:
        return _joined(name, converted.shape, found, where)
    [part] = found
    if isinstance(part.encoding, Grid) and part.shape[-1:] != converted.shape[-1:]:
        raise Unsupported(f"{where}: the rows of {quoted(name)} are others in diffusers. Use the original weights.")
    return replace(part, name=name, shape=converted.shape)


def _in_codes(tensor: StoredTensor | Decoded) -> Decoded:
    if isinstance(tensor, Decoded):
        return tensor
    stored, blocks = in_blocks(tensor)
    return Decoded(tensor.name, "F32", tensor.shape, {CODES: stored}, blocks)


def _cut(tensor: Decoded, start: int, count: int) -> Decoded | None:
    """``count`` values from ``start`` on; None if those cannot be parted from the others."""
    if (start, count) == (0, math.prod(tensor.shape)):
        return tensor
    if isinstance(tensor.encoding, Blocks):
        return _cut_blocks(tensor, tensor.encoding, start, count)
    if isinstance(tensor.encoding, Grid) and len(tensor.shape) == 2:
        return _cut_rows(tensor, tensor.encoding, start, count)
    return None


def _cut_blocks(tensor: Decoded, blocks: Blocks, start: int, count: int) -> Decoded | None:
    if start % blocks.values or count % blocks.values:
        return None
    stored = tensor.parts[CODES]
    part = stored._replace(
        shape=(count,),
        offset=stored.offset + start // blocks.values * blocks.width,
        nbytes=count // blocks.values * blocks.width,
    )
    return replace(tensor, shape=(count,), parts={CODES: part})


def _cut_rows(tensor: Decoded, grid: Grid, start: int, count: int) -> Decoded | None:
    rows, columns = tensor.shape
    high, wide = grid.block
    first, last = start // columns, (start + count) // columns
    if start % columns or count % columns:
        return None
    parts = {**tensor.parts, CODES: _rows(tensor.parts[CODES], rows, first, last)}
    if high >= rows:
        grid = replace(grid, block=(last - first, wide))
    elif first % high or (last % high and last != rows):
        return None
    elif SCALE in parts:
        parts[SCALE] = _rows(parts[SCALE], -(-rows // high), first // high, -(-last // high))
    return replace(tensor, shape=(last - first, columns), parts=parts, encoding=grid)


def _rows(stored: StoredTensor, rows: int, first: int, last: int) -> StoredTensor:
    """Those of a tensor of ``rows`` rows."""
    each = stored.nbytes // rows
    shape = (last - first, *stored.shape[1:])
    return stored._replace(shape=shape, offset=stored.offset + first * each, nbytes=(last - first) * each)


def _joined(name: str, shape: tuple[int, ...], found: Sequence[Decoded], where: str) -> Decoded:
    unit = math.lcm(*(each.encoding.values if isinstance(each.encoding, Blocks) else each.shape[-1] for each in found))
    if any(math.prod(each.shape) % unit for each in found):
        raise Unsupported(
            f"{where}: {quoted(name)} is joined from parts that are not whole blocks of {unit} values. Use the "
            "original weights."
        )
    parts = {
        kind if not number else f"{kind} {number}": part
        for number, each in enumerate(found)
        for kind, part in each.parts.items()
    }
    return Decoded(name, found[0].dtype, shape, parts, Pieces(tuple(found)))


def _arranged(name: str, shape: tuple[int, ...], view: View, tensor: StoredTensor | Decoded, where: str) -> Decoded:
    """Values in another order, for which they are all needed."""
    if isinstance(tensor, Decoded) and not isinstance(tensor.encoding, Blocks):
        raise Unsupported(
            f"{where}: {quoted(name)} is in another order in diffusers, and its 8-bit floats have scales. Use the "
            "original weights."
        )
    stored, blocks = in_blocks(tensor)

    def arrange(values: Any) -> Any:
        strides = tuple(stride * 4 for stride in view.strides)
        return np.lib.stride_tricks.as_strided(values.reshape(-1)[view.start :], shape, strides, writeable=False)

    return Decoded(name, "F32", shape, {CODES: stored}, replace(blocks, arrange=arrange))
