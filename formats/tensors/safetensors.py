"""The safetensors format as it is read: the rules of headers, and where each tensor lies.

Stricter than safetensors 0.8.0, which takes duplicate names, names that hold control characters, and tensors of any
rank. What :func:`read_header` accepts, safetensors accepts, with the same tensors at the same offsets.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from qz.counted import plural
from qz.formats.malformed import GIT_LFS_POINTER, UNSAFE_TEXT, Malformed, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# In the order of safetensors' ``Dtype``; ``save_file`` writes the last of them first.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 16
MAX_NAME = 1024
MAX_METADATA = 10_000
MAX_STRING = 10_000_000
MAX_ENTRY = 4096
FIRST_READ = 65_536

_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = rb"[ \t\n\r]*+"
_STRING = re.compile(_SPACE + rb'("[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")' + _SPACE, re.DOTALL)
_NEXT = re.compile(_SPACE + rb"(.?)", re.DOTALL)
# An entry as every known writer writes it; anything else is parsed by ``json``, which is slower.
_INT = rb"(?:0|[1-9][0-9]{0,18})"
_ENTRY = re.compile(
    rb'"dtype": ?"([A-Z0-9_]+)", ?"shape": ?\[((?:%b(?:, ?%b){0,15}+)?+)\], ?"data_offsets": ?\[(%b), ?(%b)\]\}'
    % ((_INT,) * 4)
)
# A name and its entry of an ASCII header, with the comma or the brace behind it: the fast way through long ones.
_LINE = re.compile(
    rf'[ \t\n\r]*+"([^"\\\x00-\x1f\x7f]{{1,{MAX_NAME}}}+)" ?: ?\{{{_ENTRY.pattern.decode()}[ \t\n\r]*+([,}}])', re.ASCII
)
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorInfo(NamedTuple):
    """One entry of a header. ``start`` and ``stop`` are bytes from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself. ``tensors`` is ordered by offset; the data section starts at byte ``data_start``."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> Header:
    """The header of a file of ``size`` bytes, with ``read(offset, length)``; Malformed names ``where`` and why.

    Every byte of the file is accounted for: no hole, no overlap, nothing behind the last tensor.
    """
    if size == 0:
        raise Malformed("empty-file", f"{where} is empty. Download it again.")
    if size < 8:
        held = f"only {size} {plural('byte', size)}"
        raise Malformed("not-safetensors", f"{where} has {held}: not a safetensors file. Download it again.")
    first = read(0, min(size, FIRST_READ))
    length = int.from_bytes(first[:8], "little")
    if length > size - 8 or length > MAX_HEADER or length < 2 or first[8:9] != b"{":
        raise _not_a_header(first, length, size, where)
    text = first[8 : 8 + length] if 8 + length <= len(first) else read(8, length)
    return _Parser(text, where).header(size)


def _not_a_header(first: bytes | bytearray, length: int, size: int, where: str) -> Malformed:
    """What a file is that does not start with a header length and a brace."""
    for starts, kind, what in _OTHER_FILES:
        if first[:40].lower().startswith(starts):
            return Malformed(kind, f"{where} is {what}")
    if first[8:9] == b"{" and size - 8 < length <= MAX_HEADER:
        why = f"its header of {length} bytes does not fit in the {size} bytes there are"
        return Malformed("truncated", f"{where} is truncated: {why}. Download it again.")
    if first[8:9] == b"{" and length > MAX_HEADER:
        told = f"{where} has a header of {length} bytes; {MAX_HEADER} are allowed. Download it again."
        return Malformed("header-malformed", told)
    why = "not a safetensors file, or is damaged: it has no valid header"
    return Malformed("not-safetensors", f"{where} is {why}. Download it again.")


_OTHER_FILES = (
    ((GIT_LFS_POINTER,), "git-lfs-pointer", "a Git-LFS pointer, not the weights. Run `git lfs pull` there."),
    (
        (b"pk\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04"),
        "pickle",
        "a pickle file, not safetensors, and can run code: qz does not load it. Get the weights in safetensors.",
    ),
    ((b"gguf",), "gguf", "a GGUF file, not safetensors. Use the original checkpoint."),
    ((b"<!doc", b"<html"), "not-safetensors", "a web page, not weights: a failed download. Download it again."),
)


class _Parser:
    """Reads one header from left to right, an entry at a time, so that a bomb costs no more than its first bad one."""

    def __init__(self, text: bytes | bytearray, where: str) -> None:
        self.text = text
        self.where = where
        self.ascii = text.decode("ascii") if text.isascii() else None
        self.sizes: dict[tuple[str, str], tuple[tuple[int, ...], int] | None] = {}

    def fail(self, why: str) -> NoReturn:
        raise Malformed(
            "header-malformed", f"{self.where} has a malformed header: {why}. Download it again, or save it anew."
        )

    def header(self, size: int) -> Header:
        text = self.text
        if text.count(b'"dtype"') > MAX_TENSORS:
            self.fail(f"more than {MAX_TENSORS} tensors")
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] | None = None
        position, more = self.opened(1)
        while more:
            position, more = self.plain_lines(position, tensors)
            if not more:
                break
            name, position = self.key(position)
            if name == "__metadata__":
                if metadata is not None:
                    self.fail("__metadata__ appears twice")
                metadata, position = self.metadata(position)
            else:
                if name in tensors:
                    self.fail(f"tensor {quoted(name)} appears twice")
                tensors[name], position = self.tensor(name, position)
                if len(tensors) > MAX_TENSORS:
                    self.fail(f"more than {MAX_TENSORS} tensors")
            position, more = self.next(position)
        if text[position:].strip(b" \t\n\r"):
            self.fail("something follows the closing brace")
        data_start = 8 + len(text)
        ordered = sorted(tensors.values(), key=itemgetter(3, 4))  # start and stop
        self.contiguous(ordered, size - data_start)
        return Header({info.name: info for info in ordered}, metadata or {}, data_start)

    def plain_lines(self, position: int, tensors: dict[str, TensorInfo]) -> tuple[int, bool]:
        """Add the tensors up to the first that is not in the plainest form, or is wrong: that one is the caller's.

        Returns the position behind the last one taken, and whether another key follows.
        """
        if self.ascii is None:
            return position, True
        text, sizes, match = self.ascii, self.sizes, _LINE.match
        while line := match(text, position):
            name, dtype, extents, start, stop, after = line.groups()
            key = dtype, extents
            if key not in sizes:
                sizes[key] = _shape_and_size(dtype, extents)
            known = sizes[key]
            first, last = int(start), int(stop)
            if known is None or last - first != known[1] or name in tensors or name == "__metadata__":
                break
            tensors[name] = TensorInfo(name, dtype, known[0], first, last)
            position = line.end()
            if after == "}":
                return position, False
        return position, True

    def opened(self, position: int) -> tuple[int, bool]:
        """Behind an opening brace: whether a first key follows; if not, the position behind the closing brace."""
        match = _NEXT.match(self.text, position)
        if match is not None and match[1] == b"}":
            return match.end(), False
        return position, True

    def next(self, position: int) -> tuple[int, bool]:
        """Behind a value: the position behind the comma or the closing brace, and whether another key follows."""
        match = _NEXT.match(self.text, position)
        if match is None or match[1] not in (b",", b"}"):
            self.fail(f"a comma or a brace is missing at byte {8 + position}")
        return match.end(), match[1] == b","

    def key(self, position: int) -> tuple[str, int]:
        match = _STRING.match(self.text, position)
        if match is None or b"\\" in match[1] or len(match[1]) > MAX_STRING:
            name, position = self.string(position)
        else:
            try:
                name, position = match[1][1:-1].decode("utf-8"), match.end()
            except UnicodeDecodeError:
                self.fail(f"the name at byte {8 + position} is not UTF-8")
        if self.text[position : position + 1] != b":":
            self.fail(f"a colon is missing at byte {8 + position}")
        return name, position + 1

    def string(self, position: int) -> tuple[str, int]:
        match = _STRING.match(self.text, position)
        if match is None:
            self.fail(f"a string is missing, has no end or holds control characters at byte {8 + position}")
        if len(match[1]) > MAX_STRING:
            self.fail(f"the string at byte {8 + position} is {len(match[1])} bytes long")
        try:
            value = json.loads(match[1].decode("utf-8"))
        except ValueError as error:
            self.fail(f"a string at byte {8 + position} is not valid UTF-8 JSON ({type(error).__name__})")
        if not isinstance(value, str) or _SURROGATE.search(value):
            self.fail(f"a string at byte {8 + position} is not valid Unicode")
        return value, match.end()

    def metadata(self, position: int) -> tuple[dict[str, str], int]:
        match = _NEXT.match(self.text, position)
        if match is None or match[1] != b"{":
            self.fail("__metadata__ is not an object")
        found: dict[str, str] = {}
        position, more = self.opened(match.end())
        while more:
            key, position = self.key(position)
            if key in found:
                self.fail(f"__metadata__ has {quoted(key)} twice")
            start = _NEXT.match(self.text, position)
            if start is None or start[1] != b'"':
                self.fail(f"__metadata__ {quoted(key)} is not a string")
            found[key], position = self.string(position)
            if len(found) > MAX_METADATA:
                self.fail(f"__metadata__ has more than {MAX_METADATA} keys")
            position, more = self.next(position)
        return found, position

    def tensor(self, name: str, position: int) -> tuple[TensorInfo, int]:
        if not name or len(name.encode()) > MAX_NAME or UNSAFE_TEXT.search(name):
            why = (
                "is empty"
                if not name
                else "is too long"
                if len(name.encode()) > MAX_NAME
                else "holds control characters"
            )
            self.fail(f"the tensor name {quoted(name)} {why}")
        opening = _NEXT.match(self.text, position)
        if opening is None or opening[1] != b"{":
            self.fail(f"tensor {quoted(name)} is not described by an object")
        entry = _ENTRY.match(self.text, opening.end())
        if entry is not None:
            dtype = entry[1].decode()
            shape = tuple(map(int, entry[2].split(b","))) if entry[2] else ()
            start, stop = int(entry[3]), int(entry[4])
            position = entry.end()
        else:
            dtype, shape, start, stop, position = self.unusual(name, opening.end() - 1)
        self.checked(name, dtype, shape, start, stop)
        return TensorInfo(name, dtype, shape, start, stop), position

    def unusual(self, name: str, position: int) -> tuple[str, tuple[int, ...], int, int, int]:
        """An entry with its fields in another order, or with more white space."""
        try:
            value, end = _ENTRY_DECODER.raw_decode(self.text[position : position + MAX_ENTRY].decode("latin-1"))
        except (ValueError, RecursionError) as error:
            self.fail(
                f"tensor {quoted(name)}: {error}"
                if isinstance(error, _UnusualJSONError)
                else f"tensor {quoted(name)} is not described in valid JSON"
            )
        if not isinstance(value, dict) or set(value) != _FIELDS:
            self.fail(f"tensor {quoted(name)} needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str):
            self.fail(f"tensor {quoted(name)} has a dtype that is not a string")
        if not _whole_numbers(shape):
            self.fail(f"tensor {quoted(name)} has a shape that is not a list of whole numbers")
        if not _whole_numbers(offsets) or len(offsets) != 2:
            self.fail(f"tensor {quoted(name)} has data_offsets that are not two whole numbers")
        return dtype, tuple(shape), offsets[0], offsets[1], position + end

    def checked(self, name: str, dtype: str, shape: tuple[int, ...], start: int, stop: int) -> None:
        bits = BITS.get(dtype)
        if bits is None:
            self.fail(f"tensor {quoted(name)} has the unknown dtype {quoted(dtype)}")
        if len(shape) > MAX_DIMENSIONS:
            self.fail(f"tensor {quoted(name)} has {len(shape)} dimensions")
        elements = 1
        for extent in shape:
            elements *= extent
            if elements >> 64:  # safetensors refuses the overflow even if a later dimension is 0
                self.fail(f"tensor {quoted(name)} has an impossibly large shape")
        bits *= elements
        if bits & 7 or bits >> 3 != stop - start:
            self.fail(f"tensor {quoted(name)} of {dtype} {list(shape)} does not fill its bytes {start} to {stop}")

    def contiguous(self, ordered: Sequence[TensorInfo], length: int) -> None:
        position = 0
        for info in ordered:
            if info.start != position:
                what = "overlaps the one before it" if info.start < position else "leaves a hole before it"
                self.fail(f"tensor {quoted(info.name)} {what} (data bytes {info.start} to {info.stop})")
            position = info.stop
        if position > length:
            less = position - length
            why = f"{less} {plural('byte', less)} of its tensors {'is' if less == 1 else 'are'} missing"
            raise Malformed("truncated", f"{self.where} is truncated: {why}. Download it again.")
        if position < length:
            more = length - position
            self.fail(f"{more} {plural('byte', more)} {'follows' if more == 1 else 'follow'} the last tensor")


def _shape_and_size(dtype: str, extents: str) -> tuple[tuple[int, ...], int] | None:
    """The shape that is written ``1,2,3`` and its bytes; None for what :meth:`_Parser.checked` must look at."""
    shape = tuple(map(int, extents.split(","))) if extents else ()
    bits = BITS.get(dtype, 0)
    for extent in shape:
        bits *= extent
        if bits >> 64:
            return None
    return (shape, bits >> 3) if dtype in BITS and not bits & 7 and len(shape) <= MAX_DIMENSIONS else None


class _UnusualJSONError(ValueError):
    """Something that JSON allows and a header must not hold."""


def _no_constant(text: str) -> NoReturn:
    raise _UnusualJSONError(f"{text} is not a number")


def _bounded_int(text: str) -> int:
    if text.startswith("-") or len(text) > 20:
        raise _UnusualJSONError("a number is negative or too large")
    return int(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _UnusualJSONError("a field appears twice")
    return found


_ENTRY_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_int=_bounded_int, parse_constant=_no_constant)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 64 for item in value)
