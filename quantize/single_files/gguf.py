"""Tensors of a single file in GGUF in the names of diffusers: whole blocks of its tensors, put together as values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qz import Unsupported
from qz.formats.checkpoint.gguf import in_blocks
from qz.formats.decoded import CODES, Decoded, StoredTensor
from qz.formats.encodings import Blocks, JoinedBlocks, joined_part
from qz.formats.malformed import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qz.quantize.libraries.diffusers.tracing import Converted, View


def of_blocks(name: str, converted: Converted, tensors: Mapping[str, StoredTensor | Decoded], where: str) -> Decoded:
    """A tensor of the model, put together from ``tensors`` as ``converted`` says; Unsupported for parts of blocks."""
    if not isinstance(converted.content, tuple):
        view: Any = converted.content
        return _arranged(name, converted.shape, view, tensors[view.source])
    found: list[tuple[StoredTensor, Blocks]] = []
    for piece in converted.content:
        stored, blocks = in_blocks(tensors[piece.source])
        if piece.start % blocks.values or piece.count % blocks.values:
            raise Unsupported(
                f"{where}: {quoted(name)} is a part of {quoted(stored.name)} that does not begin and end with a block "
                f"of {blocks.values} values. Use the original weights."
            )
        found.append((_cut(stored, blocks, piece.start, piece.count), blocks))
    if len(found) == 1:
        [(part, blocks)] = found
        return Decoded(name, "F32", converted.shape, {CODES: part}, blocks)
    return _joined(name, converted.shape, found, where)


def _joined(name: str, shape: tuple[int, ...], found: Sequence[tuple[StoredTensor, Blocks]], where: str) -> Decoded:
    largest = max(blocks.values for _, blocks in found)
    if any(part.shape[0] % largest for part, _ in found):
        raise Unsupported(
            f"{where}: {quoted(name)} is joined from parts that are no multiple of a block of {largest} values. Use "
            "the original weights."
        )
    parts = {joined_part(number): part for number, (part, _) in enumerate(found)}
    return Decoded(name, "F32", shape, parts, JoinedBlocks(tuple(blocks for _, blocks in found)))


def _cut(stored: StoredTensor, blocks: Blocks, start: int, count: int) -> StoredTensor:
    """``count`` values from ``start`` on."""
    return stored._replace(
        shape=(count,),
        offset=stored.offset + start // blocks.values * blocks.width,
        nbytes=count // blocks.values * blocks.width,
    )


def _arranged(name: str, shape: tuple[int, ...], view: View, tensor: StoredTensor | Decoded) -> Decoded:
    """Values in another order, for which they are all needed."""
    stored, blocks = in_blocks(tensor)

    def arrange(values: Any) -> Any:
        strides = tuple(stride * 4 for stride in view.strides)
        return np.lib.stride_tricks.as_strided(values.reshape(-1)[view.start :], shape, strides, writeable=False)

    return Decoded(name, "F32", shape, {CODES: stored}, replace(blocks, arrange=arrange))
