"""What a step reads: a stored tensor, one that bitsandbytes or another tool quantized, or one with LoRAs in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qz import Unsupported
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight
from qz.formats.tensors.decoded import Decoded, StoredTensor
from qz.formats.tensors.encodings import TransposedBlocks
from qz.quantize.adapters.changes import Change


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


@dataclass(frozen=True, slots=True)
class Stacked:
    """Matrices of one shape that lie apart and are read as one tensor, each transposed: the experts of a layer."""

    name: str
    parts: tuple[StoredTensor | Packed, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape[::-1])

    @property
    def file(self) -> str:
        return self.parts[0].file

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Fused:
    """A source with LoRAs fused into it: read as float32, which is rounded once, to the weight's dtype."""

    base: StoredTensor | Packed | Decoded | Stacked
    changes: tuple[Change, ...]
    """In the order in which the LoRAs were named."""
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def file(self) -> str:
        return self.base.file

    @property
    def offset(self) -> int:
        return self.base.offset

    @property
    def nbytes(self) -> int:
        return self.base.nbytes


@dataclass(frozen=True, slots=True)
class Composed:
    """Values of other sources, one after the other, as float32: of each, ``count`` from ``start`` on."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Fused, int, int], ...]
    """(source, start, count)."""
    dtype: str = "F32"

    @property
    def file(self) -> str:
        return self.parts[0][0].file

    @property
    def offset(self) -> int:
        return min(source.offset for source, _, _ in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source, _, _ in self.parts)


Source = StoredTensor | Packed | Decoded | Stacked | Fused | Composed


def fused_parts(source: Source) -> tuple[Fused, ...]:
    """What of a source has LoRAs in it, or might have."""
    if isinstance(source, Composed):
        return tuple({id(part): part for part, _, _ in source.parts}.values())
    return (source,) if isinstance(source, Fused) else ()


def unfused(source: Source) -> tuple[StoredTensor | Packed | Decoded | Stacked, ...]:
    """The source, or all that it is composed of, without the LoRAs that are fused into it."""
    if isinstance(source, Fused | Composed):
        return tuple(part.base for part in fused_parts(source))
    return (source,)


def stored_parts(source: Source) -> tuple[StoredTensor, ...]:
    """All that is stored of a source."""
    return tuple(stored for base in unfused(source) for stored in _stored(base))


def _stored(base: StoredTensor | Packed | Decoded | Stacked) -> tuple[StoredTensor, ...]:
    if isinstance(base, StoredTensor):
        return (base,)
    if isinstance(base, Stacked):
        return tuple(stored for part in base.parts for stored in stored_parts(part))
    return tuple((base.weight if isinstance(base, Packed) else base).parts.values())


def packed_parts(source: Source) -> tuple[Packed, ...]:
    """What bitsandbytes quantized of a source."""
    parts = (part for base in unfused(source) for part in (base.parts if isinstance(base, Stacked) else (base,)))
    return tuple(part for part in parts if isinstance(part, Packed))


def is_quantized(source: Source) -> bool:
    """Whether what is read is stored in another form than its values."""
    if isinstance(source, StoredTensor):
        return False
    return bool(packed_parts(source)) or any(isinstance(base, Decoded) and base.computed for base in unfused(source))


def part_of(source: Source, index: int) -> Source:
    """The part of a source at ``index`` along its first dimension, as a source of its own."""
    if isinstance(source, StoredTensor):
        return _slice(source, index)
    if isinstance(source, Decoded) and isinstance(source.encoding, TransposedBlocks):
        parts = {kind: _slice(part, index) for kind, part in source.parts.items()}
        return replace(source, shape=source.shape[1:], parts=parts)
    raise Unsupported(f"{source.name} cannot be read expert by expert as it is stored. Leave out --experts.")


def _slice(tensor: StoredTensor, index: int) -> StoredTensor:
    nbytes = tensor.nbytes // tensor.shape[0]
    return tensor._replace(shape=tensor.shape[1:], offset=tensor.offset + index * nbytes, nbytes=nbytes)
