"""Codes of the transposed matrix in 32-bit words, as GPTQ and AWQ pack them: read some rows of the weight at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qz.formats.decoded import CODES, GROUPS, SCALE, ZERO_POINT, Columns, Decoded
from qz.quantize.decoding.groups import group_indexes
from qz.quantize.decoding.parts import Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class ColumnsReader:
    """Whole rows of the weight, which are columns of what is stored: the packed codes are kept as a whole."""

    def __init__(self, folder: Folder, tensor: Decoded, layout: Columns) -> None:
        self.tensor, self.layout = tensor, layout
        self.parts = Parts(folder, tensor)
        self.columns = tensor.shape[1]
        self.factor = 32 // layout.bits
        self.unit = max(self.columns, 1) * self.factor

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        first, last = start // self.columns, -(-stop // self.columns)
        words = slice(first // self.factor, -(-last // self.factor))
        rows = slice(first, last)
        codes = self._codes(words, rows)
        scales = self.parts.as_floats(self.parts.array(SCALE)[:, rows], SCALE)
        zeros = self._zeros(words, last - first)
        values = codes.astype(np.float32)
        if GROUPS in self.tensor.parts:
            of = group_indexes(self.parts, len(scales))
        else:
            of = np.arange(self.columns) // self.layout.group
        values -= zeros[of]
        values *= scales[of]
        return self.parts.rounded(np.ascontiguousarray(values.T), target, memory)

    def _codes(self, words: slice, rows: slice) -> NDArray[Any]:
        """(columns of the weight, rows) of codes."""
        stored = self.parts.array(CODES)
        if self.layout.packed == "columns":
            return self._unpacked(stored[:, words], rows.stop - rows.start)
        taken = stored[:, rows].view(np.uint32)
        codes = np.empty((taken.shape[0], self.factor, taken.shape[1]), np.uint8)
        for place in range(self.factor):
            codes[:, place] = taken >> np.uint32(place * self.layout.bits) & np.uint32((1 << self.layout.bits) - 1)
        return codes.reshape(-1, taken.shape[1])[: self.columns]

    def _zeros(self, words: slice, count: int) -> NDArray[np.float32]:
        """(groups, rows) of zero points."""
        mask = (1 << self.layout.bits) - 1
        if ZERO_POINT not in self.tensor.parts:
            return np.full((self.parts.array(SCALE).shape[0], count), (mask + 1) // 2, np.float32)
        zeros = self._unpacked(self.parts.array(ZERO_POINT)[:, words], count).astype(np.int32)
        return (zeros + self.layout.zero_offset & mask).astype(np.float32)

    def _unpacked(self, taken: NDArray[Any], count: int) -> NDArray[np.uint8]:
        """Words that go along the weight's rows, one row of them for each of the stored ones."""
        words = np.ascontiguousarray(taken).view(np.uint32)
        codes = np.empty((words.shape[0], words.shape[1], self.factor), np.uint8)
        for place in range(self.factor):
            to = _AWQ_ORDER[place] if self.layout.packed == "columns" and self.layout.bits == 4 else place
            codes[:, :, to] = words >> np.uint32(place * self.layout.bits) & np.uint32((1 << self.layout.bits) - 1)
        return codes.reshape(words.shape[0], -1)[:, :count]
