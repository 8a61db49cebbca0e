"""The header of a GGUF file: its metadata and where its tensors lie, read under bounds.

Little-endian versions 2 and 3 of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qz.formats.malformed import Malformed, quoted

MAGIC: Final = b"GGUF"
MAX_METADATA, MAX_TENSORS = 16_384, 65_536
"""Entries, of which ComfyUI's files have one for a tensor; the experts of a layer are one tensor."""
MAX_STRING = 1 << 20
MAX_LIST, MAX_ELEMENTS, MAX_HEADER = 1_000_000, 8_000_000, 256 << 20
"""Elements of a list, and of all lists together, of which a vocabulary has three; and bytes."""
LONG_LIST, LONG_STRING, MAX_KEPT = 4_096, 64 << 10, 16 << 20
"""What is longer, as vocabularies are, is passed over. Bytes of all that is kept."""
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
    """What a file says of itself."""

    metadata: dict[str, Any]
    """Without lists and strings that are long."""
    lengths: dict[str, int]
    """Of those that were passed over."""
    kept: tuple[tuple[int, int], ...]
    """First byte and end of each entry of ``metadata`` in the file."""
    alignment: int
    """Bytes, of which the place of every tensor is a multiple."""
    tensors: dict[str, GgufTensor]


def read_gguf_header(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> GgufHeader:
    """The header of a file of ``size`` bytes, with ``read(offset, length)``; Malformed names ``where`` and why."""
    cursor, tensors, entries = _begun(read, size, where)
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    kept: list[tuple[int, int]] = []
    for _ in range(entries):
        begin, key = cursor.position, cursor.string()
        if key in metadata or key in lengths:
            raise cursor.malformed(f"{quoted(key)} appears twice")
        value = cursor.value(cursor.number("I"))
        if isinstance(value, _Skipped):
            lengths[key] = value.length
        else:
            metadata[key] = value
            kept.append((begin, cursor.position))
    listed = [_tensor(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise cursor.malformed("its alignment is not a valid number of bytes")
    start = -(-cursor.position // alignment) * alignment
    found = {each.name: GgufTensor(each.name, each.shape, each.type, start + each.offset) for each in listed}
    if len(found) != len(listed):
        raise cursor.malformed("two of its tensors have the same name")
    return GgufHeader(metadata, lengths, tuple(kept), alignment, found)


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
    return cursor, cursor.count(MAX_TENSORS), cursor.count(MAX_METADATA)


def joined_header(entries: Sequence[bytes | bytearray], tensors: Iterable[GgufTensor], alignment: int) -> bytes:
    """A header with these entries of metadata, as they lie in a file, which lists ``tensors``.

    All of them are said to lie at its end. Of a model in several files each lists its own, and the first alone has the
    metadata.
    """
    listed = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(listed), len(entries)), *entries]
    for each in listed:
        name = each.name.encode()
        parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(each.shape))]
        parts += [struct.pack(f"<{len(each.shape)}Q", *each.shape), struct.pack("<IQ", each.type, 0)]
    made = b"".join(parts)
    return made + bytes(-len(made) % alignment)


def _tensor(cursor: _Cursor) -> GgufTensor:
    name, dimensions = cursor.string(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise cursor.malformed(f"{quoted(name)} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    return GgufTensor(name, shape, cursor.number("I"), cursor.number("Q"))


@dataclass(frozen=True, slots=True)
class _Skipped:
    """A list or a string that was passed over."""

    length: int


class _Cursor:
    """Reads from the front, a buffer at a time; whatever would reach beyond the file's end is refused."""

    def __init__(self, read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> None:
        self.read, self.size, self.where = read, size, where
        self.position = self.elements = self.kept = 0
        self.start, self.buffer = 0, bytes(read(0, min(size, 1 << 20)))

    def malformed(self, why: str) -> Malformed:
        return Malformed("gguf-malformed", f"{self.where} is not a valid GGUF file: {why}. Download it again.")

    def require(self, length: int) -> None:
        if self.position + length > self.size:
            raise self.malformed(f"it ends at byte {self.size}, inside its header")

    def take(self, length: int) -> bytes:
        self.require(length)
        if self.position + length > self.start + len(self.buffer):
            self.start = self.position
            self.buffer = bytes(self.read(self.start, min(self.size - self.start, max(length, 1 << 20))))
        first = self.position - self.start
        self.position += length
        return self.buffer[first : first + length]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def skip(self, length: int) -> None:
        self.require(length)
        if self.position > MAX_HEADER:
            raise self.malformed("its metadata is longer than that of any model")
        self.position += length

    def count(self, most: int) -> int:
        found = int(self.number("Q"))
        if found > most:
            raise self.malformed(f"it counts {found} entries where {most} are allowed")
        return found

    def length(self) -> int:
        """Of a string that follows."""
        found = int(self.number("Q"))
        if found > MAX_STRING:
            raise self.malformed(f"a string of it is {found} bytes long")
        return found

    def string(self) -> str:
        return self.text(self.length())

    def text(self, length: int) -> str:
        self.kept += length
        if self.kept > MAX_KEPT:
            raise self.malformed("its metadata is longer than that of any model")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.malformed("a string of it is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            length = self.length()
            if length <= LONG_STRING:
                return self.text(length)
            self.skip(length)
            return _Skipped(length)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.malformed(f"a value has the unknown type {kind}")
        inner, count = self.number("I"), self.count(MAX_LIST)
        if inner != _STRING and inner not in _SCALARS:
            raise self.malformed("a list of it holds lists" if inner == _ARRAY else f"a list has the type {inner}")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise self.malformed("its lists are longer than those of any model")
        if count <= LONG_LIST:
            return [self.string() if inner == _STRING else self.number(_SCALARS[inner]) for _ in range(count)]
        if inner == _STRING:
            for _ in range(count):
                self.skip(self.length())
        else:
            self.skip(count * struct.calcsize("<" + _SCALARS[inner]))
        return _Skipped(count)
