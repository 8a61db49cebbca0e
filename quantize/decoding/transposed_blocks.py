"""gpt-oss's experts: matrices of E2M1 codes with an exponent for 32 of them, that are read transposed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from qz.formats.tensors.decoded import CODES, SCALE, Decoded
from qz.quantize.decoding.codes import Floats, look_up, pairs
from qz.quantize.decoding.parts import Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.files.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory

BLOCK = 32
KEPT = 2
"""Matrices whose codes are kept: chunks of one are read by several threads, and one begins where another ends."""


class TransposedBlocksReader:
    """``BLOCK`` rows of the result, which are a column of blocks: the codes of a whole matrix are kept for that."""

    def __init__(self, folder: Folder, tensor: Decoded) -> None:
        self.folder, self.tensor = folder, tensor
        self.parts = Parts(folder, tensor)
        *_, self.columns, self.rows = tensor.shape
        self.blocks = self.columns // BLOCK
        self.unit = BLOCK * max(self.rows, 1)
        self.lock = threading.Lock()
        self.held: dict[int, tuple[NDArray[np.uint8], Floats]] = {}

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        values = memory("decoded", (stop - start) * 4).view(np.float32)
        first, last, done = start // self.unit, stop // self.unit, 0
        while first < last:
            matrix, block = divmod(first, self.blocks)
            count = min(self.blocks - block, last - first)
            piece = self._decoded(matrix, block, count)
            values[done : done + piece.size] = piece.reshape(-1)
            first, done = first + count, done + piece.size
        return self.parts.rounded(values, target, memory)

    def _decoded(self, matrix: int, block: int, count: int) -> Floats:
        """Rows of one matrix of the result."""
        codes, scales = self._matrix(matrix)
        taken = np.ascontiguousarray(codes[:, block : block + count]).reshape(-1)
        values = np.empty(taken.size * 2, np.float32)
        look_up(pairs(), taken, values.view(np.uint64))
        shaped = values.reshape(self.rows, count, BLOCK)
        shaped *= scales[:, block : block + count, None]
        return np.ascontiguousarray(shaped.reshape(self.rows, -1).T)

    def _matrix(self, number: int) -> tuple[NDArray[np.uint8], Floats]:
        """The codes (rows, blocks, 16) and scales (rows, blocks) of one matrix."""
        with self.lock:
            if number not in self.held:
                codes, exponents = self._part(CODES, number, 16), self._part(SCALE, number, 1)
                scales = self.parts.as_floats(exponents, SCALE, "F8_E8M0")
                while len(self.held) >= KEPT:
                    del self.held[next(iter(self.held))]
                self.held[number] = codes, scales.reshape(self.rows, self.blocks)
            return self.held[number]

    def _part(self, part: str, number: int, width: int) -> NDArray[np.uint8]:
        stored, length = self.tensor.parts[part], self.rows * self.blocks * width
        raw = np.empty(length, np.uint8)
        self.folder.read_into(stored.file, stored.offset + number * length, raw.data)
        return raw.reshape(self.rows, self.blocks, width)
