"""What a step reads: tensors as they are stored, and weights that bitsandbytes quantized, as values in chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qz.formats.checkpoint import StoredTensor
from qz.formats.folder import Folder
from qz.formats.quantized import QuantizedWeight
from qz.quantize import kernels
from qz.quantize.architecture import SAFETENSORS_NAMES, TORCH_NAMES, Weight

Bytes = NDArray[np.uint8]
Memory = Callable[[str, int], Bytes]
"""A thread's reusable memory: a use and a length in bytes in, that memory out; valid until the use's next call."""

NUMPY = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
"""How kernels see values: fp32, or the bits of the 16-bit floats."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized weight as a source: ``shape`` and ``dtype`` are those it is read as, the place is its codes'.

    4-bit weights are read in the dtype of their quant state, as ``bitsandbytes.functional.dequantize_4bit`` gives them,
    int8 weights in float32, as ``int8_vectorwise_dequant`` does, or rounded from that at once.
    """

    weight: QuantizedWeight
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def file(self) -> str:
        return self.weight.parts["weight"].file

    @property
    def offset(self) -> int:
        return self.weight.parts["weight"].offset

    @property
    def nbytes(self) -> int:
        return self.weight.parts["weight"].nbytes


Source = StoredTensor | Packed


class Reader(Protocol):
    """Reads one source in chunks, from any thread."""

    unit: int
    """Values that cannot be parted: a chunk starts at a multiple of it."""

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        """The bytes of values ``[start, stop)``, and their dtype: the source's own, or ``target`` if that is exact."""
        ...


class Dequantizer(Protocol):
    """Where quantized weights are computed back: ``qz.quantize.kernels``, or an ``Arithmetic``. The same bytes."""

    def dequantize_4bit(
        self,
        packed: Bytes,
        absmax: NDArray[np.float32],
        quant_type: Literal["nf4", "fp4"],
        blocksize: int,
        dtype: str,
        out: NDArray[Any],
        /,
    ) -> None: ...

    def dequantize_int8(
        self, weight: NDArray[np.int8], scb: NDArray[np.float32], dtype: str, out: NDArray[Any], /
    ) -> None: ...


def reader(folder: Folder, source: Source, dequantizer: Dequantizer = kernels) -> Reader:
    """The reader of a source; it holds what it needs of the whole tensor, so it should live as long as the work."""
    if isinstance(source, StoredTensor):
        return _Stored(folder, source)
    kind = _Int8 if source.weight.kind == "int8" else _FourBit
    return kind(folder, source, dequantizer)


def values(raw: Bytes, dtype: str) -> NDArray[Any]:
    """Bytes as the kernels' values; other dtypes (float64, integers) stay as bytes."""
    return raw.view(NUMPY[dtype]) if dtype in NUMPY else raw


def elements(shape: Iterable[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


class _Stored:
    unit = 1

    def __init__(self, folder: Folder, source: StoredTensor) -> None:
        self.folder, self.source = folder, source
        self.size = source.nbytes // max(elements(source.shape), 1)

    def read(self, start: int, stop: int, _: str, memory: Memory, /) -> tuple[Bytes, str]:
        raw = memory("raw", (stop - start) * self.size)
        self.folder.read_into(self.source.file, self.source.offset + start * self.size, raw.data)
        return raw, self.source.dtype


class _FourBit:
    """Whole blocks of 4-bit codes. Doubly quantized block statistics are dequantized once, for the whole tensor."""

    def __init__(self, folder: Folder, source: Packed, dequantizer: Dequantizer) -> None:
        assert source.weight.blocksize is not None  # planning refuses a weight without its quant state
        self.folder, self.source, self.dequantizer = folder, source, dequantizer
        self.unit = source.weight.blocksize
        self.quant_type: Literal["nf4", "fp4"] = "nf4" if source.weight.kind == "nf4" else "fp4"
        self.lock = threading.Lock()
        self.absmax: NDArray[np.float32] | None = None

    def read(self, start: int, stop: int, _: str, memory: Memory, /) -> tuple[Bytes, str]:
        source, count = self.source, stop - start
        absmax = self._absmax(start // self.unit, -(-stop // self.unit), memory)
        codes = memory("source codes", -(-count // 2))
        self.folder.read_into(source.file, source.offset + start // 2, codes.data)
        raw = memory("raw", count * np.dtype(NUMPY[source.dtype]).itemsize)
        out = raw.view(NUMPY[source.dtype])
        self.dequantizer.dequantize_4bit(codes, absmax, self.quant_type, self.unit, source.dtype, out)
        return raw, source.dtype

    def _absmax(self, first: int, last: int, memory: Memory) -> NDArray[np.float32]:
        """The scales of blocks ``[first, last)``."""
        weight = self.source.weight
        if not weight.double_quant:
            raw = memory("source absmax", (last - first) * 4)
            stored = weight.parts["absmax"]
            self.folder.read_into(stored.file, stored.offset + first * 4, raw.data)
            return raw.view(np.float32)
        assert weight.nested_offset is not None
        assert weight.nested_blocksize is not None
        with self.lock:
            if self.absmax is None:
                self.absmax = kernels.dequantize_absmax(
                    self._part("absmax"),
                    self._part("nested_absmax").view(np.float32),
                    self._part("nested_quant_map").view(np.float32),
                    weight.nested_offset,
                    weight.nested_blocksize,
                )
        absmax: NDArray[np.float32] = self.absmax[first:last]
        return absmax

    def _part(self, name: str) -> Bytes:
        stored = self.source.weight.parts[name]
        raw = np.empty(stored.nbytes, np.uint8)
        self.folder.read_into(stored.file, stored.offset, raw.data)
        return raw


class _Int8:
    """Whole rows of int8 codes."""

    def __init__(self, folder: Folder, source: Packed, dequantizer: Dequantizer) -> None:
        self.folder, self.source, self.dequantizer = folder, source, dequantizer
        self.unit = max(source.shape[1], 1)

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        source, scales = self.source, self.source.weight.parts["SCB"]
        dtype = target if target in NUMPY else source.dtype
        rows, columns = (stop - start) // self.unit, source.shape[1]
        scb = memory("source scb", rows * 4)
        self.folder.read_into(scales.file, scales.offset + start // self.unit * 4, scb.data)
        codes = memory("source codes", rows * columns)
        self.folder.read_into(source.file, source.offset + start, codes.data)
        raw = memory("raw", rows * columns * np.dtype(NUMPY[dtype]).itemsize)
        self.dequantizer.dequantize_int8(
            codes.view(np.int8).reshape(rows, columns),
            scb.view(np.float32),
            dtype,
            raw.view(NUMPY[dtype]).reshape(rows, columns),
        )
        return raw, dtype


def assemble(folder: Folder, weight: Weight, sources: Iterable[Source]) -> Bytes:
    """A weight that is merged, split or turned, in its dtype: its sources in memory at once, through torch."""
    import torch

    dtype = getattr(torch, weight.dtype)
    target = SAFETENSORS_NAMES[weight.dtype]
    tensors = {}
    for source in sources:
        count = elements(source.shape)
        raw, stored = reader(folder, source).read(0, count, target, lambda _, nbytes: np.empty(nbytes, np.uint8))
        tensor = torch.from_numpy(raw).view(getattr(torch, TORCH_NAMES[stored])).reshape(source.shape)
        tensors[source.name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    tensor = weight.conversion(tensors)[weight.name] if weight.conversion else next(iter(tensors.values()))
    if weight.transposed:
        tensor = tensor.T
    assembled: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return assembled
