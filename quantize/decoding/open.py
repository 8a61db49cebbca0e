"""The reader of a tensor that is stored in another form than its values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from qz.formats.tensors.decoded import Decoded
from qz.formats.tensors.encodings import Blocks, Columns, Grid, Identity, Joined, Pieces, Strided
from qz.quantize.decoding.blocks import BlocksReader
from qz.quantize.decoding.columns import ColumnsReader
from qz.quantize.decoding.grid import GridReader
from qz.quantize.decoding.identity import IdentityReader
from qz.quantize.decoding.joined import JoinedReader
from qz.quantize.decoding.pieces import PiecesReader
from qz.quantize.decoding.strided import StridedReader
from qz.quantize.decoding.transposed_blocks import TransposedBlocksReader

if TYPE_CHECKING:
    from qz.formats.files.folder import Folder
    from qz.quantize.compute.arrays import Bytes, Memory


class Reader(Protocol):
    """Reads one source in chunks, from any thread."""

    unit: int
    """Values that cannot be parted: a chunk starts at a multiple of it."""

    def read(self, start: int, stop: int, target: str, memory: Memory, /) -> tuple[Bytes, str]:
        """The bytes of values ``[start, stop)``, and their dtype: the source's own, or ``target`` if that is exact."""
        ...


def decoding_reader(folder: Folder, tensor: Decoded) -> Reader:
    """It holds what it needs of the whole tensor, so it should live as long as the work."""
    if isinstance(tensor.encoding, Grid):
        return GridReader(folder, tensor, tensor.encoding)
    if isinstance(tensor.encoding, Columns):
        return ColumnsReader(folder, tensor, tensor.encoding)
    if isinstance(tensor.encoding, Blocks):
        return BlocksReader(folder, tensor, tensor.encoding)
    if isinstance(tensor.encoding, Strided):
        return StridedReader(folder, tensor, tensor.encoding)
    if isinstance(tensor.encoding, Joined):
        return JoinedReader(folder, tensor)
    if isinstance(tensor.encoding, Pieces):
        pieces = tensor.encoding.tensors
        return PiecesReader(
            [decoding_reader(folder, each) for each in pieces], [math.prod(each.shape) for each in pieces]
        )
    if isinstance(tensor.encoding, Identity):
        return IdentityReader(tensor)
    return TransposedBlocksReader(folder, tensor)
