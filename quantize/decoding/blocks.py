"""ggml's blocks, as the gguf package dequantizes them, and how a library then arranges the values."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qz.formats.checkpoint.gguf import TYPES
from qz.formats.tensors.decoded import CODES, Decoded
from qz.formats.tensors.encodings import Blocks
from qz.quantize.compute import kernels
from qz.quantize.compute.tables import widen
from qz.quantize.decoding.codes import Floats
from qz.quantize.decoding.parts import Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.files.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory


PIECE = 1 << 16
"""Values that are dequantized at a time."""


class BlocksReader:
    """Whole blocks, or whole rows where they come in another order; a tensor that is arranged otherwise, as a whole."""

    def __init__(self, folder: Folder, tensor: Decoded, blocks: Blocks) -> None:
        self.folder, self.tensor, self.blocks = folder, tensor, blocks
        self.parts = Parts(folder, tensor)
        self.row = tensor.parts[CODES].shape[-1] if tensor.parts[CODES].shape else 1
        self.unit = blocks.values if blocks.rows is None and blocks.arrange is None else max(self.row, 1)
        self.lock = threading.Lock()
        self.whole: Floats | None = None

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        blocks = self.blocks
        if blocks.arrange is not None:
            return self.parts.rounded(self._arranged()[start:stop], target, memory)
        if blocks.rows is None:
            return self.parts.rounded(self._values(start, stop, memory), target, memory)
        rows = np.frombuffer(blocks.rows, np.int64)[start // self.row : stop // self.row]
        values = memory("decoded", (stop - start) * 4).view(np.float32).reshape(-1, self.row)
        for first, last, place in _runs(rows):
            values[place : place + last - first] = self._values(first * self.row, last * self.row, memory).reshape(
                -1, self.row
            )
        return self.parts.rounded(values, target, memory)

    def _values(self, start: int, stop: int, memory: Memory) -> Floats:
        """Values as they are stored, in float32."""
        stored, blocks = self.tensor.parts[CODES], self.blocks
        first, last = start // blocks.values * blocks.width, -(-stop // blocks.values) * blocks.width
        codes = memory("source codes", last - first)
        self.folder.read_into(stored.file, stored.offset + first, codes.data)
        return dequantized(codes, blocks)

    def _arranged(self) -> Floats:
        with self.lock:
            if self.whole is None:
                stored = self.tensor.parts[CODES]
                raw = np.empty(stored.nbytes, np.uint8)
                self.folder.read_into(stored.file, stored.offset, raw.data)
                values = dequantized(raw, self.blocks).reshape(stored.shape)
                assert self.blocks.arrange is not None
                arranged = np.ascontiguousarray(self.blocks.arrange(values), np.float32)
                self.whole = arranged.reshape(-1)
            return self.whole


def dequantized(codes: Bytes, blocks: Blocks) -> Floats:
    """Whole blocks as float32 values."""
    if blocks.values == 1:
        if blocks.type == 30:  # bfloat16
            return widen(codes.view(np.uint16), "BF16")
        return codes.view({0: np.float32, 1: np.float16, 28: np.float64}[blocks.type]).astype(np.float32)
    values = np.empty(codes.size // blocks.width * blocks.values, np.float32)
    rows = codes.reshape(-1, blocks.width)
    if kernels.dequantize_blocks(TYPES[blocks.type][0], rows, values.reshape(-1, blocks.values)):
        return values
    from gguf import GGMLQuantizationType, dequantize

    step = max(1, PIECE // blocks.values)
    for start in range(0, len(rows), step):  # keeps temporaries in the cache
        row = rows[start : start + step].reshape(1, -1)  # of several rows, gguf takes sixteen at a time
        piece: Any = dequantize(row, GGMLQuantizationType(blocks.type))
        values[start * blocks.values :][: piece.size] = piece.reshape(-1)
    return values


def _runs(rows: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Stretches of rows that follow each other: first, end, and where they come."""
    if not rows.size:
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    begins = [0, *cuts.tolist(), rows.size]
    return [(int(rows[a]), int(rows[a]) + b - a, a) for a, b in pairwise(begins)]
