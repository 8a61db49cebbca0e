"""Values in another order than they are read in: a transposed view that was pickled as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qz.formats.tensors.decoded import CODES, Decoded
from qz.formats.tensors.encodings import Strided
from qz.formats.tensors.safetensors import BITS
from qz.quantize.decoding.parts import Parts

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory


class StridedReader:
    """Slices of the first dimension; all values are in memory, as one of these is made from every part of them."""

    def __init__(self, folder: Folder, tensor: Decoded, layout: Strided) -> None:
        self.tensor, self.layout = tensor, layout
        self.parts = Parts(folder, tensor)
        self.width = BITS[tensor.parts[CODES].dtype] // 8
        self.unit = max(int(np.prod(tensor.shape[1:])), 1)

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        values = self.parts.array(CODES).reshape(-1).view(np.uint8).view(f"V{self.width}")
        strides = tuple(stride * self.width for stride in self.layout.strides)
        arranged = np.lib.stride_tricks.as_strided(values, self.tensor.shape, strides, writeable=False)
        raw = memory("raw" if self.tensor.codes is None else "source codes", (stop - start) * self.width)
        taken = arranged[start // self.unit : stop // self.unit]
        np.copyto(raw.view(f"V{self.width}").reshape(taken.shape), taken)
        return self.parts.ordered(raw, target, memory)
