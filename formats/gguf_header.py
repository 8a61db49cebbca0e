"""The header of a GGUF file: its metadata and where its tensors lie, read under bounds.

Little-endian versions 2 and 3 of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from qz.formats.malformed import Malformed, quoted

MAGIC: Final = b"GGUF"
MAX_ENTRIES = 1_000_000
MAX_STRING = 1 << 20
MAX_ELEMENTS, MAX_HEADER = 8_000_000, 256 << 20
"""Of all lists together, of which a vocabulary has three; and bytes."""
MAX_DIMENSIONS = 5
"""One more than in ggml: files of video models for ComfyUI have 3-D convolutions."""
FLOAT32: Final = 0
"""The type of tensors of float32."""
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """``shape`` begins with the dimension that lies next to each other; ``offset`` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    after_metadata: int
    """Byte at which the list of tensors begins."""


def read_gguf_header(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> GgufHeader:
    """The header of a file of ``size`` bytes, with ``read(offset, length)``; Malformed names ``where`` and why."""
    cursor, tensors, entries = _begun(read, size, where)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in metadata:
            raise cursor.malformed(f"{quoted(key)} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    after_metadata = cursor.position
    listed = [_tensor(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise cursor.malformed("its alignment is no number of bytes")
    start = -(-cursor.position // alignment) * alignment
    found = {each.name: GgufTensor(each.name, each.shape, each.type, start + each.offset) for each in listed}
    if len(found) != len(listed):
        raise cursor.malformed("two of its tensors have the same name")
    return GgufHeader(metadata, found, after_metadata)


def gguf_names(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> Iterator[str]:
    """The names of its metadata, then those of its tensors, each before anything beyond it is read."""
    cursor, tensors, entries = _begun(read, size, where)
    for _ in range(entries):
        yield cursor.string()
        cursor.value(cursor.number("I"))
    for _ in range(tensors):
        yield _tensor(cursor).name


def _begun(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> tuple[_Cursor, int, int]:
    """A cursor before the metadata; how many tensors there are, and entries of metadata."""
    cursor = _Cursor(read, size, where)
    if cursor.take(4) != MAGIC:
        raise cursor.malformed("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        told = " (it is big-endian)" if swapped in (2, 3) else ""
        raise cursor.malformed(f"its version {version} is not 2 or 3{told}")
    return cursor, cursor.count(), cursor.count()


def joined_header(first: bytes, header: GgufHeader, tensors: Iterable[GgufTensor]) -> bytes:
    """A header with the metadata of ``first``, a file's bytes up to its list of tensors, which lists ``tensors``.

    All of them are said to lie at its end. Of a model in several files each lists its own, and the first alone has the
    metadata.
    """
    listed = list(tensors)
    parts = [first[:8], struct.pack("<Q", len(listed)), first[16 : header.after_metadata]]
    for each in listed:
        name = each.name.encode()
        parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(each.shape))]
        parts += [struct.pack(f"<{len(each.shape)}Q", *each.shape), struct.pack("<IQ", each.type, 0)]
    made = b"".join(parts)
    alignment = header.metadata.get("general.alignment", 32)
    return made + bytes(-len(made) % alignment)


def _tensor(cursor: _Cursor) -> GgufTensor:
    name, dimensions = cursor.string(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise cursor.malformed(f"{quoted(name)} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    return GgufTensor(name, shape, cursor.number("I"), cursor.number("Q"))


class _Cursor:
    """Reads from the front, a buffer at a time; whatever would reach beyond the file's end is refused."""

    def __init__(self, read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> None:
        self.read, self.size, self.where = read, size, where
        self.position = self.elements = 0
        self.start, self.buffer = 0, bytes(read(0, min(size, 1 << 20)))

    def malformed(self, why: str) -> Malformed:
        return Malformed("gguf-malformed", f"{self.where} is not a valid GGUF file: {why}. Download it again.")

    def take(self, length: int) -> bytes:
        if self.position + length > self.size:
            raise self.malformed(f"it ends at byte {self.size}, inside its header")
        if self.position + length > self.start + len(self.buffer):
            self.start = self.position
            self.buffer = bytes(self.read(self.start, min(self.size - self.start, max(length, 1 << 20))))
        first = self.position - self.start
        self.position += length
        return self.buffer[first : first + length]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def count(self) -> int:
        found = int(self.number("Q"))
        if found > MAX_ENTRIES:
            raise self.malformed(f"it counts {found} entries where {MAX_ENTRIES} are allowed")
        return found

    def string(self) -> str:
        length = int(self.number("Q"))
        if length > MAX_STRING:
            raise self.malformed(f"a string of it is {length} bytes long")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.malformed("a string of it is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.malformed(f"a value has the unknown type {kind}")
        inner, count = self.number("I"), self.count()
        if inner == _ARRAY:
            raise self.malformed("a list of it holds lists")
        self.elements += count
        if self.elements > MAX_ELEMENTS or self.position > MAX_HEADER:
            raise self.malformed("its lists are longer than those of any model")
        return [self.value(inner) for _ in range(count)]
