"""What a step reads, as values in chunks: stored tensors, weights that were quantized, and LoRAs fused into both."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qz import MalformedInput
from qz.formats.files.folder import Folder
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import Decoded, StoredTensor
from qz.quantize.adapters.changes import Changes, matrix_shape
from qz.quantize.compute import kernels
from qz.quantize.compute.arrays import NUMPY, Buffers, Bytes, Memory, values
from qz.quantize.compute.tables import QUANT_MAPS
from qz.quantize.decoding.open import Reader, decoding_reader
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, TORCH_NAMES, Weight
from qz.quantize.planning.sources import Composed, Fused, Packed, Source, Stacked

PIECE = 4 << 20
"""Values computed at a time where a whole tensor is needed."""
MAP_TOLERANCE = 1e-6
"""Versions of bitsandbytes computed the same maps with different last bits."""


class Dequantizer(Protocol):
    """Where quantized weights are computed back: ``compute.kernels``, or an ``Arithmetic``. The same bytes."""

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
    if isinstance(source, Decoded):
        return decoding_reader(folder, source)
    if isinstance(source, Fused):
        return _Fused(source, reader(folder, source.base, dequantizer))
    if isinstance(source, Composed):
        return _Composed(folder, source, dequantizer)
    if isinstance(source, Stacked):
        return _Stacked(folder, source, dequantizer)
    kind = _Int8 if source.weight.kind == "int8" else _FourBit
    return kind(folder, source, dequantizer)


class _Stored:
    unit = 1

    def __init__(self, folder: Folder, source: StoredTensor) -> None:
        self.folder, self.source = folder, source
        self.size = source.nbytes // max(math.prod(source.shape), 1)

    def read(self, start: int, stop: int, _: str, memory: Memory, /) -> tuple[Bytes, str]:
        raw = memory("raw", (stop - start) * self.size)
        self.folder.read_into(self.source.file, self.source.offset + start * self.size, raw.data)
        return raw, self.source.dtype


class _Stacked:
    """Whole matrices, each read and transposed."""

    def __init__(self, folder: Folder, source: Stacked, dequantizer: Dequantizer) -> None:
        self.source = source
        self.unit = math.prod(source.parts[0].shape)
        self.readers = [reader(folder, part, dequantizer) for part in source.parts]

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        held: list[Bytes] = []
        for number in range(start // self.unit, -(-stop // self.unit)):
            raw, dtype = self.readers[number].read(0, self.unit, target, memory)
            size = raw.nbytes // self.unit
            matrix = raw.reshape(*self.source.parts[number].shape, size)
            held.append((matrix.swapaxes(0, 1) if matrix.ndim == 3 else matrix).flatten())  # a copy: raw is reused
        return np.concatenate(held), dtype


class _FourBit:
    """Whole blocks of 4-bit codes. Doubly quantized block statistics are dequantized once, for the whole tensor."""

    def __init__(self, folder: Folder, source: Packed, dequantizer: Dequantizer) -> None:
        assert source.weight.blocksize is not None  # planning refuses a weight without its quant state
        self.folder, self.source, self.dequantizer = folder, source, dequantizer
        self.unit = source.weight.blocksize
        self.quant_type: Literal["nf4", "fp4"] = "nf4" if source.weight.kind == "nf4" else "fp4"
        self.lock = threading.Lock()
        self.absmax: NDArray[np.float32] | None = None
        self.known_map = False

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
        self._require_known_map()
        if not weight.double_quant:
            raw = memory("source absmax", (last - first) * 4)
            stored = weight.parts["absmax"]
            self.folder.read_into(stored.file, stored.offset + first * 4, raw.data)
            require_finite(raw.view(np.float32), stored, self.folder)
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
                require_finite(self.absmax, weight.parts["nested_absmax"], self.folder)
        absmax: NDArray[np.float32] = self.absmax[first:last]
        return absmax

    def _require_known_map(self) -> None:
        """Raise MalformedInput for another map than the method's own, which is used whatever the file says."""
        with self.lock:
            if self.known_map:
                return
            found, known = self._part("quant_map").view(np.float32), QUANT_MAPS[self.quant_type]
            if not np.allclose(found, known, rtol=0, atol=MAP_TOLERANCE):
                stored = self.source.weight.parts["quant_map"]
                raise MalformedInput(
                    f"{self.folder.location}/{stored.file}: {quoted(stored.name)} is not the map of {self.quant_type}, "
                    "so what the codes stand for is not known. Quantize the original again, or download this again."
                )
            self.known_map = True

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
        require_finite(scb.view(np.float32), scales, self.folder)
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


class _Fused:
    """Values as float32, with what LoRAs add to them. Norms of rows need whole rows, norms of columns all of them."""

    def __init__(self, source: Fused, base: Reader) -> None:
        shape = source.shape or (1,)
        of_experts = any(change.expert is not None for change in source.changes)
        self.base, self.columns = base, matrix_shape(shape, experts=of_experts)[1]
        norms = {change.magnitude_of for change in source.changes}
        whole = math.prod(shape) if "columns" in norms else self.columns if "rows" in norms else 1
        self.unit = math.lcm(base.unit, max(whole, 1))
        self.changes = Changes(source.changes, self.columns)

    def read(self, start: int, stop: int, _: str, memory: Memory, /) -> tuple[Bytes, str]:
        raw, dtype = self.base.read(start, stop, "F32", memory)
        first, last = start // self.columns, -(-stop // self.columns)
        rows = memory("fused", (last - first) * self.columns * 4).view(np.float32)
        before, count = start - first * self.columns, stop - start
        rows[:before] = rows[before + count :] = 0
        own = rows[before : before + count]
        kernels.cast(values(raw, dtype), dtype, "F32", own)
        self.changes.apply(rows.reshape(last - first, self.columns), first, memory)
        return own.view(np.uint8), "F32"


class _Composed:
    """Float32 values put together from parts of other sources, each read in its own units."""

    unit = 1

    def __init__(self, folder: Folder, source: Composed, dequantizer: Dequantizer) -> None:
        readers = {id(part): reader(folder, part, dequantizer) for part, _, _ in source.parts}
        self.parts = [(readers[id(part)], math.prod(part.shape), start, count) for part, start, count in source.parts]

    def read(self, start: int, stop: int, _: str, memory: Memory, /) -> tuple[Bytes, str]:
        out, begins = memory("composed", (stop - start) * 4).view(np.float32), 0
        for part, whole, first, count in self.parts:
            low, high = max(start - begins, 0), min(stop - begins, count)
            if low < high:
                begin = (first + low) // part.unit * part.unit
                end = min(-(-(first + high) // part.unit) * part.unit, whole)
                raw, dtype = part.read(begin, end, "F32", memory)
                own = values(raw, dtype)[first + low - begin : first + high - begin]
                out[begins + low - start : begins + high - start] = own
            begins += count
        return out.view(np.uint8), "F32"


def require_finite(scales: NDArray[np.float32], stored: StoredTensor, folder: Folder) -> None:
    """Raise MalformedInput if one of the scales is NaN or infinite: all that is computed with it would be nonsense."""
    count = scales.size - int(np.count_nonzero(np.isfinite(scales)))
    if count:
        raise MalformedInput(
            f"{folder.location}/{stored.file}: {quoted(stored.name)} gives {count:,} "
            f"{'scale that is' if count == 1 else 'scales that are'} NaN or infinite: the weight cannot be computed. "
            "Quantize the original again, or download this again."
        )


def assemble(folder: Folder, weight: Weight, sources: Iterable[Source]) -> Bytes:
    """A weight that is merged, split, transposed, or cast from or to what no kernel knows, in its dtype.

    Its sources are in memory at once; torch casts them.
    """
    import torch

    dtype = getattr(torch, weight.dtype)
    target = SAFETENSORS_NAMES[weight.dtype]
    tensors = {}
    for source in sources:
        count = math.prod(source.shape)
        raw, stored = _read_whole(reader(folder, source), count, target)
        flat = torch.from_numpy(raw) if count else torch.empty(0, dtype=torch.uint8)  # which has a stride
        tensor = flat.view(getattr(torch, TORCH_NAMES[stored])).reshape(source.shape)
        tensors[source.name] = tensor.to(dtype)  # whatever its own is, as the library does before it merges or splits
    tensor = weight.conversion(tensors)[weight.name] if weight.conversion else next(iter(tensors.values()))
    if weight.transposed:
        tensor = tensor.T
    assembled: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return assembled


def _read_whole(opened: Reader, count: int, target: str) -> tuple[Bytes, str]:
    """All values of a source, computed in pieces: what decoding needs besides stays small."""
    length = max(opened.unit, PIECE // opened.unit * opened.unit)
    memory = Buffers().get
    if count <= length:
        return opened.read(0, count, target, memory)
    raw, dtype = opened.read(0, length, target, memory)
    size = raw.nbytes // length
    whole = np.empty(count * size, np.uint8)
    whole[: raw.nbytes] = raw
    for start in range(length, count, length):
        stop = min(start + length, count)
        raw, _ = opened.read(start, stop, target, memory)
        whole[start * size : stop * size] = raw
    return whole, dtype
