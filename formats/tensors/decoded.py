"""A tensor as it is stored: its values, or parts in another form and how they become values.

Recognizing needs headers only; ``qz.quantize.decoding`` computes. In all encodings a value is
``(code - zero point) * scale``, in float32, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qz.formats.tensors.encodings import Encoding


class StoredTensor(NamedTuple):
    """A tensor and where it lies: ``offset`` counts from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


FLOATS_8 = ("F8_E4M3", "F8_E5M2")
"""Dtypes that are codes where there are scales, or that are not computed with."""
CODES = "codes"
SCALE = "scale"
ZERO_POINT = "zero point"
GLOBAL_SCALE = "global scale"
GROUPS = "group of each column"


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
        return self.encoding.computed or self.codes is not None

    @property
    def codes(self) -> str | None:
        """The dtype of the 8-bit floats without scales that are its values in another order."""
        stored = self.parts[CODES].dtype
        return stored if not self.encoding.computed and stored != self.dtype and stored in FLOATS_8 else None

    @property
    def nbytes(self) -> int:
        """Of all that is stored of it."""
        return sum(part.nbytes for part in self.parts.values())
