"""What decoders have in common: parts of a tensor kept as arrays, scales that must be finite, and the last rounding."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from qz import MalformedInput
from qz.formats.malformed import quoted
from qz.quantize.compute import kernels
from qz.quantize.compute.arrays import NUMPY, Bytes, Memory
from qz.quantize.compute.tables import widen
from qz.quantize.decoding.codes import Floats, look_up, table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.files.folder import Folder
    from qz.formats.tensors.decoded import Decoded, StoredTensor

_STORED: dict[str, Any] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8, "I32": np.int32,
    "I64": np.int64,
}  # fmt: skip


class Parts:
    """The parts of one tensor that are small, or cannot be read in pieces; each is read once, when it is needed."""

    def __init__(self, folder: Folder, tensor: Decoded) -> None:
        self.folder, self.tensor = folder, tensor
        self._lock = threading.Lock()
        self._held: dict[str, NDArray[Any]] = {}

    def array(self, part: str) -> NDArray[Any]:
        """As it is stored, in its own shape: BF16 as its bits, 8-bit floats as bytes."""
        stored = self.tensor.parts[part]
        with self._lock:
            if part not in self._held:
                raw = np.empty(stored.nbytes, np.uint8)
                self.folder.read_into(stored.file, stored.offset, raw.data)
                self._held[part] = raw.view(_STORED.get(stored.dtype, np.uint8)).reshape(stored.shape)
            return self._held[part]

    def floats(self, part: str, *, exponents: bool = False, rows: slice | NDArray[Any] | None = None) -> Floats:
        """(rows, columns) of a part whose last dimension are its columns; finite, or MalformedInput is raised."""
        stored, raw = self.tensor.parts[part], self.array(part)
        taken = raw.reshape(-1, raw.shape[-1] if raw.ndim > 1 else 1)
        if rows is not None:
            taken = taken[rows]
        return self.as_floats(taken, part, "F8_E8M0" if exponents else stored.dtype)

    def as_floats(self, raw: NDArray[Any], part: str, dtype: str = "") -> Floats:
        """Some of ``array(part)`` as float32; finite, or MalformedInput is raised."""
        stored = self.tensor.parts[part]
        found = _as_floats(np.ascontiguousarray(raw), dtype or stored.dtype)
        self.require_finite(found, stored)
        return found

    def require_finite(self, scales: Floats, stored: StoredTensor) -> None:
        """Raise MalformedInput if a scale is NaN or infinite: all that is computed with it would be nonsense."""
        count = scales.size - int(np.count_nonzero(np.isfinite(scales)))
        if count:
            raise MalformedInput(
                f"{self.folder.location}/{stored.file}: {quoted(stored.name)} has "
                f"{f'{count:,} scales that are' if count > 1 else 'a scale that is'} NaN or infinite, so the weight "
                "cannot be computed. Download it again."
            )

    def ordered(self, raw: Bytes, target: str, memory: Memory) -> tuple[Bytes, str]:
        """Values as they are stored, put in order; of 8-bit floats without scales, what they stand for."""
        codes = self.tensor.codes
        if codes is None:
            return raw, self.tensor.dtype
        found = memory("decoded", raw.size * 4).view(np.float32)
        look_up(table(codes), raw, found)
        return self.rounded(found, target, memory)

    def rounded(self, values: Floats, target: str, memory: Memory) -> tuple[Bytes, str]:
        """The computed values in the dtype that they are read in: the format's own, or ``target``."""
        tensor = self.tensor
        dtype = tensor.dtype if tensor.rounded else target if target in NUMPY else "F32"
        flat = values.reshape(-1)
        raw = memory("raw", flat.size * np.dtype(NUMPY[dtype]).itemsize)
        kernels.cast(flat, "F32", dtype, raw.view(NUMPY[dtype]))
        return raw, dtype


def _as_floats(raw: NDArray[Any], dtype: str) -> Floats:
    if dtype.startswith("F8"):
        found = np.empty(raw.size, np.float32)
        look_up(table(dtype), raw.view(np.uint8).reshape(-1), found)
        return found.reshape(raw.shape)
    if dtype == "BF16":
        return widen(raw, dtype)
    return raw.astype(np.float32)
