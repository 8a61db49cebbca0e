"""Codes in the order of the values, with a scale for each block: read a number of rows at a time."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from qz.formats.tensors.decoded import CODES, GLOBAL_SCALE, GROUPS, SCALE, ZERO_POINT, Decoded
from qz.formats.tensors.encodings import Grid
from qz.quantize.decoding.codes import Floats, look_up, pairs, table, unpack_rows
from qz.quantize.decoding.groups import group_indexes
from qz.quantize.decoding.parts import Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.files.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory


class GridReader:
    """Whole rows. All of the scales are kept as they are stored, a fraction of the codes."""

    def __init__(self, folder: Folder, tensor: Decoded, grid: Grid) -> None:
        self.folder, self.tensor, self.grid = folder, tensor, grid
        self.parts = Parts(folder, tensor)
        *_, self.rows, self.columns = (1, 1, *tensor.shape)
        self.unit = max(self.columns, 1)
        total = math.prod(tensor.shape) // self.unit
        self.row_bytes = tensor.parts[CODES].nbytes // max(total, 1)

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        first, last = start // self.unit, -(-stop // self.unit)
        stored = self.tensor.parts[CODES]
        codes = memory("source codes", (last - first) * self.row_bytes)
        self.folder.read_into(stored.file, stored.offset + first * self.row_bytes, codes.data)
        values = memory("decoded", (last - first) * self.columns * 4).view(np.float32).reshape(-1, self.columns)
        self._decode(codes.reshape(last - first, self.row_bytes), values)
        numbers = np.arange(first, last)
        if ZERO_POINT in self.tensor.parts:
            self._spread(np.subtract, values, self._zero_points(self._scale_rows(numbers)))
        if SCALE in self.tensor.parts:
            self._spread(np.multiply, values, self._scales(self._scale_rows(numbers)))
        return self.parts.rounded(values, target, memory)

    def _decode(self, codes: NDArray[np.uint8], values: Floats) -> None:
        kind, flat = self.grid.codes, codes.reshape(-1)
        if kind in ("F8_E4M3", "F8_E5M2"):
            look_up(table(kind), flat, values.reshape(-1))
        elif kind == "F4":
            look_up(pairs(), flat, values.reshape(-1).view(np.uint64))
        elif kind == "I8":
            np.copyto(values, codes.view(np.int8))
        else:
            np.copyto(values, unpack_rows(codes, self._bits, self.columns))
            values -= 1 << (self._bits - 1)

    @property
    def _bits(self) -> int:
        """Of a packed integer."""
        return int(self.grid.codes.removeprefix("INT"))

    def _scale_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the scales that hold for rows of the values, counted through all matrices."""
        stored = self.tensor.parts[SCALE]
        columns = stored.shape[-1] if len(stored.shape) > 1 else 1
        each = -(-self.rows // self.grid.block[0])
        there = math.prod(stored.shape) // max(columns, 1)
        matrix = rows // self.rows if there > each else 0
        found: NDArray[np.int64] = matrix * each + rows % self.rows // self.grid.block[0]
        return found

    def _scales(self, rows: NDArray[np.int64]) -> Floats:
        scales = self.parts.floats(SCALE, exponents=self.grid.exponents, rows=rows)
        if GLOBAL_SCALE in self.tensor.parts:
            factor = self.parts.floats(GLOBAL_SCALE).reshape(-1)[0]
            scales = scales * factor if self.grid.globally == "multiply" else scales / factor
            self.parts.require_finite(scales, self.tensor.parts[GLOBAL_SCALE])
        return scales

    def _zero_points(self, rows: NDArray[np.int64]) -> Floats:
        """Like the scales; those of packed integers are packed too."""
        if not self.grid.codes.startswith("INT"):
            return self.parts.floats(ZERO_POINT, rows=rows)
        return self._unpacked[rows].astype(np.float32) - (1 << (self._bits - 1))

    @cached_property
    def _unpacked(self) -> NDArray[np.uint8]:
        """(rows of scales, groups) of zero points, which are stored packed down the columns."""
        stored, bits = self.parts.array(ZERO_POINT), self._bits
        matrices = stored.reshape(-1, *stored.shape[-2:])
        each = -(-self.rows // self.grid.block[0])
        streams = np.ascontiguousarray(np.swapaxes(matrices, 1, 2))  # (matrices, groups, words)
        codes = unpack_rows(streams.view(np.uint8).reshape(-1, streams.shape[2] * 4), bits, each)
        return np.swapaxes(codes.reshape(len(matrices), -1, each), 1, 2).reshape(-1, streams.shape[1])

    def _spread(self, operation: np.ufunc, values: Floats, scales: Floats) -> None:
        """``values`` = operation(values, scales), where each scale holds for the columns of its block."""
        groups, width = scales.shape[1], self.grid.block[1]
        if GROUPS in self.tensor.parts:
            operation(values, np.take(scales, group_indexes(self.parts, groups), 1), out=values)
        elif groups == 1:
            operation(values, scales, out=values)
        else:
            whole = self.columns // width
            blocks = np.lib.stride_tricks.as_strided(
                values, (len(values), whole, width), (values.strides[0], width * 4, 4)
            )
            operation(blocks, scales[:, :whole, None], out=blocks)
            if self.columns % width:
                rest = values[:, whole * width :]
                operation(rest, scales[:, whole : whole + 1], out=rest)
