"""A tensor that lies in pieces, one after the other: of one tensor in another order, or of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.decoded import Decoded
from qz.formats.encodings import joined_part
from qz.formats.safetensors import BITS

if TYPE_CHECKING:
    from qz.formats.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory


class JoinedReader:
    """Any values; a read touches the pieces that they lie in."""

    unit = 1

    def __init__(self, folder: Folder, tensor: Decoded) -> None:
        self.folder, self.tensor = folder, tensor
        self.width = BITS[tensor.dtype] // 8
        self.parts = [tensor.parts[joined_part(number)] for number in range(len(tensor.parts))]

    def read(self, start: int, stop: int, _: str, memory: Memory, /) -> tuple[Bytes, str]:
        first, last = start * self.width, stop * self.width
        raw, begins = memory("raw", last - first), 0
        for part in self.parts:
            low, high = max(first, begins), min(last, begins + part.nbytes)
            if low < high:
                self.folder.read_into(part.file, part.offset + low - begins, raw[low - first : high - first].data)
            begins += part.nbytes
        return raw, self.tensor.dtype
