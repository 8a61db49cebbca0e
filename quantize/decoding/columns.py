"""Codes of the transposed matrix in 32-bit words, as GPTQ and AWQ pack them: read some rows of the weight at a time."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qz.formats.tensors.decoded import CODES, GROUPS, SCALE, ZERO_POINT, Decoded
from qz.formats.tensors.encodings import Columns
from qz.quantize.decoding.codes import Floats, unpack_rows
from qz.quantize.decoding.groups import group_indexes
from qz.quantize.decoding.parts import Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.files.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class ColumnsReader:
    """Whole rows of the weight, which are columns of what is stored: the packed codes are kept as a whole."""

    def __init__(self, folder: Folder, tensor: Decoded, layout: Columns) -> None:
        self.tensor, self.layout = tensor, layout
        self.parts = Parts(folder, tensor)
        self.columns = tensor.shape[1]
        self.unit = max(self.columns, 1) * (32 // math.gcd(32, layout.bits))

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        rows = slice(start // self.columns, -(-stop // self.columns))
        words = slice(rows.start * self.layout.bits // 32, -(-rows.stop * self.layout.bits // 32))
        values = memory("decoded", (stop - start) * 4).view(np.float32).reshape(-1, self.columns)
        np.copyto(values, self._codes(words, rows))
        scales = self.parts.as_floats(self.parts.array(SCALE)[:, rows].T, SCALE)
        self._spread(np.subtract, values, self._zeros(words, rows.stop - rows.start))
        self._spread(np.multiply, values, scales)
        return self.parts.rounded(values, target, memory)

    def _spread(self, operation: np.ufunc, values: Floats, of_groups: Floats) -> None:
        """``values`` = operation(values, of_groups), where (rows, groups) holds for the columns of each group."""
        if self._irregular is not None:
            operation(values, np.take(of_groups, self._irregular, 1), out=values)  # an index would give it transposed
            return
        grouped = values.reshape(len(values), -1, self.columns // of_groups.shape[1])
        operation(grouped, of_groups[:, :, None], out=grouped)

    @cached_property
    def _irregular(self) -> NDArray[Any] | None:
        """The group of each column, where they are not stretches of the same length."""
        groups = self.tensor.parts[SCALE].shape[0]
        if GROUPS not in self.tensor.parts:
            return None
        found = group_indexes(self.parts, groups)
        regular = np.repeat(np.arange(groups), -(-self.columns // groups))[: self.columns]
        return None if self.columns % groups == 0 and np.array_equal(found, regular) else found

    def _codes(self, words: slice, rows: slice) -> NDArray[Any]:
        """(rows, columns) of codes."""
        stored, bits = self.parts.array(CODES), self.layout.bits
        if self.layout.packed == "columns":
            return self._across(stored[:, words], rows.stop - rows.start).T
        taken = np.ascontiguousarray(stored[:, rows].T)  # a row is now one stream of bits
        return unpack_rows(taken.view(np.uint8), bits, self.columns)

    def _zeros(self, words: slice, count: int) -> Floats:
        """(rows, groups) of zero points."""
        mask = (1 << self.layout.bits) - 1
        zeros = self._across(self.parts.array(ZERO_POINT)[:, words], count).astype(np.int32)
        return np.ascontiguousarray((zeros + self.layout.zero_offset & mask).T, np.float32)

    def _across(self, taken: NDArray[Any], count: int) -> NDArray[np.uint8]:
        """Codes of words that go along the weight's rows, one row of them for each of the stored ones."""
        bits, words = self.layout.bits, np.ascontiguousarray(taken)
        codes = unpack_rows(words.view(np.uint8), bits, words.shape[1] * 32 // bits)
        if self.layout.packed == "columns":
            ordered = np.empty_like(codes).reshape(len(codes), -1, len(_AWQ_ORDER))
            ordered[:, :, _AWQ_ORDER] = codes.reshape(ordered.shape)
            codes = ordered.reshape(codes.shape)
        return codes[:, :count]
