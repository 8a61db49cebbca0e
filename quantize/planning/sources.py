"""What a step reads: a stored tensor, one that bitsandbytes or another tool quantized, or one with LoRAs in it."""

from __future__ import annotations

from dataclasses import dataclass

from qz.formats.checkpoint.quantized import QuantizedWeight
from qz.formats.checkpoint.survey import StoredTensor
from qz.formats.decoded import Decoded
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
class Fused:
    """A source with LoRAs fused into it: read as float32, which is rounded once, to the weight's dtype."""

    base: StoredTensor | Packed | Decoded
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


Source = StoredTensor | Packed | Decoded | Fused


def stored_parts(source: Source) -> tuple[StoredTensor, ...]:
    """All that is stored of a source."""
    if isinstance(source, Fused):
        source = source.base
    if isinstance(source, StoredTensor):
        return (source,)
    return tuple((source.weight if isinstance(source, Packed) else source).parts.values())


def is_quantized(source: Source) -> bool:
    """Whether what is read is stored in another form than its values."""
    base = source.base if isinstance(source, Fused) else source
    return not isinstance(base, StoredTensor) and (isinstance(base, Packed) or base.computed)
