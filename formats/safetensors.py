"""The safetensors format: header rules, reading by offset, and the layout that ``save_file`` gives a file."""

from __future__ import annotations

from dataclasses import dataclass

BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
        "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header. ``start`` and ``stop`` are bytes from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start
