"""A tensor as it is stored: its values, or parts in another form and how they become values.

Recognizing needs headers only; ``qz.quantize.decoding`` computes. In all encodings a value is
``(code - zero point) * scale``, in float32, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class StoredTensor(NamedTuple):
    """A tensor and where it lies: ``offset`` counts from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


CODES = "codes"
SCALE = "scale"
ZERO_POINT = "zero point"
GLOBAL_SCALE = "global scale"
GROUPS = "group of each column"


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes in the order of the values; a scale holds for a block of rows and columns of each matrix.

    ``codes``: ``F8_E4M3`` and ``F8_E5M2`` (a byte each), ``F4`` (E2M1, two in a byte, low half first), ``I8``, or
    ``INT1`` to ``INT8``: that many bits, in little-endian 32-bit words that each row fills anew, plus half their range.
    ``block``: (rows, columns) of a scale. ``exponents``: scales stored as U8 are 2 ** (scale - 127).
    ``globally``: what the global scale does to the others.
    """

    codes: str
    block: tuple[int, int]
    exponents: bool = False
    globally: Literal["multiply", "divide"] = "multiply"


@dataclass(frozen=True, slots=True)
class Columns:
    """Codes of the transposed matrix in 32-bit words, with a scale and a zero point for each column of it and group.

    The value [n, k] has the code [k, n] and the scale [group of k, n]. ``packed``: along which of code's dimensions a
    word goes: GPTQ packs ``rows`` (k), AWQ ``columns`` (n) in the order 0 2 4 6 1 3 5 7. ``bits``: 2, 3, 4 or 8 a code.
    ``zero_offset``: added to the stored zero points. ``group``: columns that share a scale, unless ``GROUPS`` says.
    """

    packed: Literal["rows", "columns"]
    bits: int
    group: int
    zero_offset: int = 0


@dataclass(frozen=True, slots=True)
class TransposedBlocks:
    """Matrices of E2M1 codes, an exponent for 32 of them: stored as (…, rows, blocks, 16), read as (…, columns, rows).

    As gpt-oss keeps its experts (``convert_moe_packed_tensors`` of transformers).
    """


@dataclass(frozen=True, slots=True)
class Strided:
    """The values themselves in another order: ``strides`` in values, as in torch; ``CODES`` begins at the first."""

    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """ggml's blocks of ``type``, of ``values`` in ``width`` bytes each, in the order of the values.

    ``rows``: which stored row each row of the result is, as int64. ``arrange``: what a library makes of the values
    otherwise, a function of an array in float32.
    """

    type: int
    values: int
    width: int
    rows: bytes | None = None
    arrange: Callable[[Any], Any] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Joined:
    """The values of all parts, one after the other: ``CODES``, then those that ``joined_part`` names."""


def joined_part(number: int) -> str:
    """The name of a part of a ``Joined``, from 0 on."""
    return CODES if not number else f"part {number}"


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity matrix, of which nothing is stored; ``CODES`` is an empty part of the file."""


Encoding = Grid | Columns | TransposedBlocks | Strided | Blocks | Joined | Identity


@dataclass(frozen=True, slots=True)
class Decoded:
    """A tensor by its plain name, as it is read: in ``dtype`` (a safetensors name) and ``shape``.

    ``parts``: what is stored of it. ``rounded``: values are rounded to ``dtype`` before anything else, as the
    format's own library does; otherwise once, to whatever dtype is asked for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredTensor]
    encoding: Encoding
    rounded: bool = False

    @property
    def file(self) -> str:
        return self.parts[CODES].file

    @property
    def offset(self) -> int:
        return self.parts[CODES].offset

    @property
    def computed(self) -> bool:
        """Whether its values are computed from codes."""
        return not isinstance(self.encoding, Strided | Joined | Identity)

    @property
    def nbytes(self) -> int:
        """Of all that is stored of it."""
        return sum(part.nbytes for part in self.parts.values())
