"""What a step reads: a tensor as it is stored, or one that bitsandbytes or another tool quantized."""

from __future__ import annotations

from dataclasses import dataclass

from qz.formats.checkpoint.quantized import QuantizedWeight
from qz.formats.checkpoint.survey import StoredTensor
from qz.formats.decoded import Decoded


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


Source = StoredTensor | Packed | Decoded


def stored_parts(source: Source) -> tuple[StoredTensor, ...]:
    """All that is stored of a source."""
    if isinstance(source, StoredTensor):
        return (source,)
    return tuple((source.weight if isinstance(source, Packed) else source).parts.values())
