"""The identity matrix in float32, which a library puts where a file has no projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qz.formats.tensors.decoded import Decoded
    from qz.quantize.compute.arrays import Bytes, Memory


class IdentityReader:
    """Reads no file."""

    unit = 1

    def __init__(self, tensor: Decoded) -> None:
        self.columns = tensor.shape[-1]

    def read(self, start: int, stop: int, _: str, memory: Memory, /) -> tuple[Bytes, str]:
        raw = memory("raw", (stop - start) * 4)
        values = raw.view(np.float32)
        values[:] = 0
        values[-start % (self.columns + 1) :: self.columns + 1] = 1
        return raw, "F32"
