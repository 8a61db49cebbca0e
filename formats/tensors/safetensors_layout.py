"""The safetensors format as it is written: the layout and the header that ``save_file`` gives a file (0.8.0)."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from qz.formats.tensors.safetensors import BITS, MAX_HEADER, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PLAIN_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
_RANK = {dtype: -place for place, dtype in enumerate(BITS)}


def layout(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[TensorInfo]:
    """Places for (name, dtype, shape) in ``save_file``'s order: dtype, widest first, then name (safetensors 0.8.0).

    Raises ValueError for an unknown dtype, or for a shape that does not fill whole bytes.
    """
    placed: list[TensorInfo] = []
    position = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: (_RANK.get(entry[1], 0), entry[0])):
        bits = BITS[dtype] if dtype in BITS else _unknown(dtype)
        for extent in shape:
            bits *= extent
        if bits & 7:
            raise ValueError(f"{name}: {dtype} {list(shape)} does not fill whole bytes")
        placed.append(TensorInfo(name, dtype, shape, position, position := position + bits // 8))
    return placed


def _unknown(dtype: str) -> NoReturn:
    raise ValueError(f"unknown dtype {dtype}")


def encode_header(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, str] = PLAIN_METADATA, reserve: int | None = None
) -> bytes:
    """All before the data section, as ``save_file`` writes it: length, compact JSON, spaces up to a multiple of 8.

    ``reserve``: the exact number of bytes wanted instead; ValueError if the header does not fit. safetensors writes
    several metadata keys in random order; here they keep the given one.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for info in tensors:
        entries[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (info.start, info.stop)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    total = 8 + len(text) + -len(text) % 8 if reserve is None else reserve
    if total < 8 + len(text) or total - 8 > MAX_HEADER:
        raise ValueError(f"a header of {8 + len(text)} bytes does not fit in {total}")
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)
