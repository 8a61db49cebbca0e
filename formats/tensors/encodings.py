"""How the parts of a tensor become its values: one class for each way of storing them.

Apart from ``decoded``, as most checkpoints are stored plainly, and the classes take time to make.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qz.formats.tensors.decoded import CODES

if TYPE_CHECKING:
    from collections.abc import Callable

    from qz.formats.tensors.decoded import Decoded


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes in the order of the values; a scale holds for a block of rows and columns of each matrix.

    ``codes``: ``F8_E4M3`` and ``F8_E5M2`` (a byte each), ``F4`` (E2M1, two in a byte, low half first), ``I8``, or
    ``INT1`` to ``INT8``: that many bits, in little-endian 32-bit words that each row fills anew, plus half their range.
    ``block``: (rows, columns) of a scale. ``exponents``: scales stored as U8 are 2 ** (scale - 127).
    ``globally``: what the global scale does to the others.
    """

    computed: ClassVar[bool] = True

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

    computed: ClassVar[bool] = True

    packed: Literal["rows", "columns"]
    bits: int
    group: int
    zero_offset: int = 0


@dataclass(frozen=True, slots=True)
class TransposedBlocks:
    """Matrices of E2M1 codes, an exponent for 32 of them: stored as (…, rows, blocks, 16), read as (…, columns, rows).

    As gpt-oss keeps its experts (``convert_moe_packed_tensors`` of transformers).
    """

    computed: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Strided:
    """The values themselves, or 8-bit floats without scales, in another order: ``strides`` in values, as in torch.

    ``CODES`` begins at the first.
    """

    computed: ClassVar[bool] = False

    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """ggml's blocks of ``type``, of ``values`` in ``width`` bytes each, in the order of the values.

    ``rows``: which stored row each row of the result is, as int64. ``arrange``: what a library makes of the values
    otherwise, a function of an array in float32.
    """

    computed: ClassVar[bool] = True

    type: int
    values: int
    width: int
    rows: bytes | None = None
    arrange: Callable[[Any], Any] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Joined:
    """The values of all parts, or 8-bit floats without scales, one after the other: ``CODES``, then those that
    ``joined_part`` names."""

    computed: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Pieces:
    """The values of ``tensors``, each stored in a form of its own, one after the other; all of their parts are those of
    the whole."""

    computed: ClassVar[bool] = True

    tensors: tuple[Decoded, ...]


def joined_part(number: int) -> str:
    """The name of a part of a ``Joined``, from 0 on."""
    return CODES if not number else f"part {number}"


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity matrix, of which nothing is stored; ``CODES`` is an empty part of the file."""

    computed: ClassVar[bool] = False


Encoding = Grid | Columns | TransposedBlocks | Strided | Blocks | Joined | Pieces | Identity
