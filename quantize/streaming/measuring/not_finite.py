"""How many values of a tensor are NaN or infinite, and since when: as stored, by a LoRA, or in the output's dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qz.quantize.compute import kernels
from qz.quantize.compute.arrays import NUMPY, Buffers, count_nonfinite, values
from qz.quantize.planning.sources import fused_parts, unfused
from qz.quantize.streaming.readers import PIECE, reader

if TYPE_CHECKING:
    from qz.formats.checkpoint.adapter_file import AdapterFile
    from qz.formats.files.folder import Folder
    from qz.quantize.planning.plan import Step


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Values that were not finite as they were ``stored``, and those that ``overflowed`` the output's dtype, or were
    made so by a LoRA.
    """

    stored: int
    overflowed: int


def adapters_of(step: Step) -> tuple[AdapterFile, ...]:
    """The LoRAs that are fused into a weight."""
    changes = (change for source in step.sources for part in fused_parts(source) for change in part.changes)
    return tuple({id(change.adapter): change.adapter for change in changes}.values())


def count_without_adapters(folder: Folder, step: Step, dtype: str | None = None) -> int:
    """How many values of a weight's sources are not finite before LoRAs are fused into them; in ``dtype``, if given."""
    memory, found = Buffers().get, 0
    for base in (base for source in step.sources for base in unfused(source)):
        opened, count = reader(folder, base), math.prod(base.shape)
        length = max(opened.unit, PIECE // opened.unit * opened.unit)
        for start in range(0, count, length):
            raw, stored = opened.read(start, min(start + length, count), dtype or base.dtype, memory)
            array = values(raw, stored)
            if dtype is not None and dtype != stored and stored in NUMPY:
                cast = memory("cast", array.size * np.dtype(NUMPY[dtype]).itemsize).view(NUMPY[dtype])
                kernels.cast(array, stored, dtype, cast)
                array, stored = cast, dtype
            found += count_nonfinite(array, stored, memory)
    return found
