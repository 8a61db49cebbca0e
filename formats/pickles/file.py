"""A pickled checkpoint file: its tensors, and where their bytes lie, in PyTorch's zip form and in the one before."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qz.formats.malformed import UNSAFE_TEXT, Malformed, quoted, quoted_names
from qz.formats.pickles.machine import load
from qz.formats.pickles.values import BrokenPickle, OtherTensor, PickledTensor, Storage, UnsafePickle
from qz.formats.tensors.decoded import CODES, Decoded, StoredTensor
from qz.formats.tensors.encodings import Strided
from qz.formats.tensors.safetensors import BITS, MAX_NAME, MAX_TENSORS

Read = Callable[[int, int], bytes | bytearray]

MOST_BYTES = 100_000_000
"""Of everything that is not a tensor."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = 30
_WRAPPERS = ("state_dict", "model_state_dict")
_TAR = b"ustar"


@dataclass(frozen=True, slots=True)
class PickledFile:
    """``left_out``: what is in the file beside the tensors of its state dict, in words."""

    tensors: dict[str, StoredTensor | Decoded]
    left_out: tuple[str, ...]


def read_pickled(read: Read, size: int, file: str, where: str) -> PickledFile:
    """The tensors of a file of ``size`` bytes, with ``read(offset, length)``; Malformed names ``where`` and why.

    Nothing in it is run: it is refused where it asks for more than containers, plain values and tensors.
    """
    source = _Source(read, size)
    try:
        is_zip = size >= 4 and source.at(0, 4) == b"PK\x03\x04"
        value, places = _from_zip(source) if is_zip else _from_legacy(source)
        return _located(value, places, size, file)
    except UnsafePickle as error:
        raise Malformed(
            "pickle-unsafe",
            f"{where} asks for {error}: such a pickle can run code, and qz does not read it. Get the weights as "
            "safetensors.",
        ) from error
    except OtherTensor as error:
        raise Malformed(
            "pickle-tensor",
            f"{where} has {error}. Load it with PyTorch, and save the plain tensors of the model as safetensors.",
        ) from error
    except (BrokenPickle, zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, ValueError) as error:
        why = str(error) if isinstance(error, BrokenPickle) else f"it is damaged ({type(error).__name__})"
        raise Malformed(
            "pickle-malformed", f"{where} is not a checkpoint saved by PyTorch: {why}. Download it again."
        ) from error


class _Source(io.RawIOBase):
    """The file as a stream for ``zipfile``; how much may be read of it is limited."""

    def __init__(self, read: Read, size: int) -> None:
        self._read, self.size, self._position, self._left = read, size, 0, MOST_BYTES

    def at(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise BrokenPickle("it is truncated")
        self._left -= length
        if self._left < 0:
            raise UnsafePickle(f"more than {MOST_BYTES:,} bytes beside its tensors")
        return bytes(self._read(offset, length))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, (0, self._position, self.size)[whence] + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self._position))
        view[:count] = self.at(self._position, count)
        self._position += count
        return count


Places = Callable[[Storage], int]
"""Where the bytes of a storage begin."""


def _from_zip(source: _Source) -> tuple[Any, Places]:
    with zipfile.ZipFile(io.BufferedReader(source), "r") as archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in members:
                raise BrokenPickle(f"{quoted(info.filename)} appears in it twice")
            members[info.filename] = info
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise BrokenPickle("it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and source.at(_begin(source, order), order.file_size) != b"little":
            raise BrokenPickle("it was saved on a big-endian machine")
        described = members[pickles[0]]
        value = load(source.at(_begin(source, described), described.file_size))

    def place(storage: Storage) -> int:
        info = members.get(f"{root}data/{storage.key}")
        if info is None:
            raise BrokenPickle(f"the storage {quoted(storage.key)} is missing")
        if info.file_size < storage.count * BITS[storage.dtype] // 8:
            raise BrokenPickle(f"the storage {quoted(storage.key)} is smaller than its tensors")
        return _begin(source, info)

    return value, place


def _begin(source: _Source, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, which is as long as it says."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise BrokenPickle(f"{quoted(info.filename)} is compressed or encrypted")
    header = source.at(info.header_offset, _LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise BrokenPickle(f"{quoted(info.filename)} is not where it should be")
    name, extra = struct.unpack("<HH", header[26:30])
    begin: int = info.header_offset + _LOCAL_HEADER + name + extra
    if begin + info.file_size > source.size:
        raise BrokenPickle("it is truncated")
    return begin


def _from_legacy(source: _Source) -> tuple[Any, Places]:
    """Pickles of a magic number, a version, the machine, the value and the storages' keys, then their bytes."""
    stream = io.BufferedReader(source)
    if source.size > 262 and source.at(257, 5) == _TAR:
        raise UnsafePickle("the form that PyTorch had before 0.1.10")
    if load(stream) != _LEGACY_MAGIC or load(stream) != _LEGACY_PROTOCOL:
        raise BrokenPickle("it does not begin as PyTorch's files do")
    machine = load(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise BrokenPickle("it was saved on a big-endian machine")
    value, keys = load(stream), load(stream)
    if not isinstance(keys, list) or len(keys) > MAX_TENSORS or not all(isinstance(key, str) for key in keys):
        raise BrokenPickle("it has no list of its storages")
    known = {storage.key: storage for storage in _storages(value)}
    begins: dict[str, int] = {}
    position = stream.tell()
    for key in keys:
        count = int.from_bytes(source.at(position, 8), "little", signed=True)
        storage = known.get(key)
        if storage is None or storage.count != count or key in begins:
            raise BrokenPickle(f"the storage {quoted(key)} is not the one that its tensors need")
        begins[key] = position + 8
        position += 8 + count * BITS[storage.dtype] // 8

    def place(storage: Storage) -> int:
        if known.get(storage.key) != storage or storage.key not in begins:
            raise BrokenPickle(f"the storage {quoted(storage.key)} is missing")
        return begins[storage.key]

    return value, place


def _storages(value: Any) -> Iterator[Storage]:
    """Of every tensor, wherever in the containers it is."""
    seen: set[int] = set()
    open_ones = [value]
    while open_ones:
        each = open_ones.pop()
        if isinstance(each, PickledTensor):
            yield each.storage
        elif isinstance(each, Storage):
            yield each
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            open_ones += each.values() if isinstance(each, dict) else each


def _located(value: Any, places: Places, size: int, file: str) -> PickledFile:
    """The tensors of a state dict, which may lie in a dictionary of more than that."""
    left_out: list[str] = []
    for _ in _WRAPPERS:
        inner = next((key for key in _WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), dict)), None)
        if inner is not None:
            left_out += [str(key) for key in value if key != inner]
            value = value[inner]
    if not isinstance(value, dict):
        raise BrokenPickle("it holds no dictionary of tensors")
    if not _holds_tensors(value) and (inside := [str(key) for key, inner in value.items() if _holds_tensors(inner)]):
        raise OtherTensor(f"its tensors in {quoted_names(inside)}, where no library looks for them")
    begins: dict[Storage, int] = {}
    tensors: dict[str, StoredTensor | Decoded] = {}
    for name, tensor in value.items():
        if not isinstance(tensor, PickledTensor):
            left_out.append(str(name))
            continue
        if type(name) is not str or not name or len(name.encode("utf-8", "replace")) > MAX_NAME:
            raise BrokenPickle("a tensor has no valid name")
        if UNSAFE_TEXT.search(name):
            raise BrokenPickle(f"the tensor name {quoted(name)} holds control characters")
        if len(tensors) >= MAX_TENSORS:
            raise BrokenPickle(f"it holds more than {MAX_TENSORS:,} tensors")
        begin = begins.get(tensor.storage)
        if begin is None:
            begin = begins[tensor.storage] = places(tensor.storage)
        tensors[name] = _stored(name, tensor, begin, size, file)
    return PickledFile(tensors, tuple(quoted(each, 60) for each in left_out))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(each, PickledTensor) for each in value.values())


def _stored(name: str, tensor: PickledTensor, begin: int, size: int, file: str) -> StoredTensor | Decoded:
    width = BITS[tensor.dtype] // 8
    there = tensor.storage.count * BITS[tensor.storage.dtype] // 8 // width
    count, reach, contiguous, step = 1, 0, True, 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        contiguous = contiguous and (extent < 2 or stride == step)
        step *= extent
        count *= extent
        reach += (extent - 1) * stride
    first, last = tensor.offset, tensor.offset + (reach + 1 if count else 0)
    if last <= there < count and count * width <= MOST_BYTES:
        raise OtherTensor(f"{quoted(name)}, a view that repeats its values, which qz does not read")
    if last > there or count > there:
        raise BrokenPickle(f"{quoted(name)} reaches beyond its storage")
    offset, nbytes = begin + first * width, (last - first) * width
    if offset + nbytes > size:
        raise BrokenPickle("it is truncated")
    if contiguous or not count:
        return StoredTensor(name, tensor.dtype, tensor.shape, file, offset, count * width)
    part = StoredTensor(name, tensor.dtype, (last - first,), file, offset, nbytes)
    return Decoded(name, tensor.dtype, tensor.shape, {CODES: part}, Strided(tensor.strides), rounded=True)
