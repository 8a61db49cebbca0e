"""gpt-oss's experts: ``<name>_blocks`` of 32 E2M1 codes and ``<name>_scales``, an exponent for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qz.formats.tensors.decoded import CODES, SCALE, Decoded
from qz.formats.tensors.encodings import TransposedBlocks

if TYPE_CHECKING:
    from qz.formats.sources.reading import Reading

_BYTES = 16
"""Of a block: 32 codes of 4 bits."""


def read_mxfp4(reading: Reading) -> None:
    """Take every pair of blocks and scales."""
    for name, blocks in reading.tensors.items():
        if not name.endswith("_blocks") or blocks.dtype != "U8":
            continue
        plain = name.removesuffix("_blocks")
        scales = reading.tensors.get(f"{plain}_scales")
        if scales is None:
            reading.missing(plain, "mxfp4", "scales")
            continue
        shape = blocks.shape
        if len(shape) != 4 or shape[-1] != _BYTES or 0 in shape or scales.shape != shape[:-1] or scales.dtype != "U8":
            reading.misfit(scales, shape)
            continue
        read_as = (*shape[:-3], shape[-2] * _BYTES * 2, shape[-3])
        parts = {CODES: blocks, SCALE: scales}
        reading.take(Decoded(plain, reading.dtype, read_as, parts, TransposedBlocks()))
