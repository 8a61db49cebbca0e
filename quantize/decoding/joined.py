"""A tensor that lies in pieces, one after the other: of one tensor in another order, or of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.tensors.decoded import CODES, Decoded
from qz.formats.tensors.encodings import joined_part
from qz.formats.tensors.safetensors import BITS
from qz.quantize.decoding.parts import Parts

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory


class JoinedReader:
    """Any values, or 8-bit floats; a read touches the pieces that they lie in."""

    unit = 1

    def __init__(self, folder: Folder, tensor: Decoded) -> None:
        self.folder, self.tensor = folder, tensor
        self.width = BITS[tensor.parts[CODES].dtype] // 8
        self.whole = Parts(folder, tensor)
        self.parts = [tensor.parts[joined_part(number)] for number in range(len(tensor.parts))]

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        first, last = start * self.width, stop * self.width
        raw, begins = memory("raw" if self.tensor.codes is None else "source codes", last - first), 0
        for part in self.parts:
            low, high = max(first, begins), min(last, begins + part.nbytes)
            if low < high:
                self.folder.read_into(part.file, part.offset + low - begins, raw[low - first : high - first].data)
            begins += part.nbytes
        return self.whole.ordered(raw, target, memory)
