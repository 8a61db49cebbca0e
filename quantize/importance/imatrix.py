"""llama.cpp's importance matrices, which lie beside many published GGUF files: sums of squares like qz's own.

GGUF files hold ``TENSOR.in_sum2`` and ``TENSOR.counts`` (llama.cpp, pull request 9400); the older ``.dat`` files hold
means. Their tensors have llama.cpp's names (``blk.0.attn_q.weight``); which names of transformers these belong to, the
``gguf`` package knows. That llama.cpp permutes the rows of q and k does not matter to the inputs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qz.formats.files.file_hash import sha256_of
from qz.formats.files.folder import read_at
from qz.formats.files.links import followed
from qz.formats.files.local_folder import LocalFolder
from qz.formats.malformed import Malformed, quoted
from qz.formats.tensors.gguf_header import FLOAT32, MAGIC, GgufHeader, GgufTensor, read_gguf_header
from qz.quantize.importance.named_file import require_file_of_statistics
from qz.quantize.importance.statistics import Floats, InputSums, Statistics, check_sums

if TYPE_CHECKING:
    from qz.quantize.planning.plan import Step

MAX_BYTES = 1 << 31
MAX_TENSORS = 100_000
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")
_WRAPPERS = ("language_model.", "text_model.", "model.")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of llama.cpp's: float32 (experts, in) sums of squares, and float32[experts] counts."""

    sum2: Floats
    counts: Floats


def is_imatrix(path: Path) -> bool:
    """Whether the file is one of llama.cpp's, by its first bytes or its name. Raises as
    ``require_file_of_statistics``."""
    require_file_of_statistics(path)
    folder, name = _opened(path)
    if folder.sizes().get(name, 0) < 4:
        return path.suffix == ".dat"
    first = bytearray(4)
    folder.read_into(name, 0, memoryview(first))
    return bytes(first) == MAGIC or path.suffix == ".dat"


def _opened(path: Path) -> tuple[LocalFolder, str]:
    """The folder and the file in it; the user named it, so a link is followed."""
    real = followed(path)
    return LocalFolder(real.parent), real.name


def read_imatrix(path: Path, steps: Iterable[Step]) -> Statistics:
    """The matrix's sums under the names of the weights that it speaks of. Raises MissingInput or Malformed."""
    folder, name = _opened(path)
    size = folder.sizes().get(name, 0)
    if size > MAX_BYTES:
        raise _malformed(f"{path} is {size:,} bytes long, which is too large for such a file")
    read = read_at(folder, name)
    entries = (
        _gguf_entries(read, size, path) if bytes(read(0, 4)) == MAGIC else _dat_entries(bytes(read(0, size)), path)
    )
    return Statistics(str(path), sha256_of(path), _named(entries, list(steps)))


def _gguf_entries(read: Any, size: int, path: Path) -> dict[str, Entry]:
    header = read_gguf_header(read, size, str(path))
    if header.metadata.get("general.type") != "imatrix":
        kind = quoted(str(header.metadata.get("general.type", "model")))
        raise _malformed(f"{path} is a GGUF file of the type {kind}, not an imatrix")
    names = [name.removesuffix(".in_sum2") for name in header.tensors if name.endswith(".in_sum2")]
    return {name: _gguf_entry(read, size, path, header, name) for name in names}


def _gguf_entry(read: Any, size: int, path: Path, header: GgufHeader, name: str) -> Entry:
    def values(tensor: GgufTensor | None, what: str) -> Floats:
        count = int(np.prod(tensor.shape, dtype=object)) if tensor is not None else 0
        if tensor is None or tensor.type != FLOAT32 or not tensor.shape or not 0 < 4 * count <= size - tensor.offset:
            raise _malformed(f"{path}: {quoted(name + what)} is missing, cut off, or not of float32")
        found: Floats = np.frombuffer(read(tensor.offset, 4 * count), np.float32)
        return found.reshape(-1, tensor.shape[0])

    sum2 = values(header.tensors[name + ".in_sum2"], ".in_sum2")
    counts = values(header.tensors.get(name + ".counts"), ".counts").reshape(-1)
    if counts.size != len(sum2):
        raise _malformed(f"{path}: {quoted(name)} has {len(sum2)} rows of sums and {counts.size} counts")
    for count in (float(counts.min()), float(counts.max())):
        check_sums(sum2, count, f"{path}: {quoted(name)}")
    return Entry(sum2, counts)


def _dat_entries(data: bytes, path: Path) -> dict[str, Entry]:
    """``n``, then for each tensor: length and name, number of chunks, length and values × chunks; int32 and float32.

    The rows of experts follow each other, so that their number shows only with the weight's length.
    """
    position = 0

    def number(what: str, most: int) -> int:
        nonlocal position
        if position + 4 > len(data):
            raise _malformed(f"{path} ends inside {what}")
        found = int(struct.unpack_from("<i", data, position)[0])
        position += 4
        if not 0 < found <= most:
            raise _malformed(f"{path} is not an imatrix of llama.cpp: {found} is not {what}")
        return found

    entries = {}
    for _ in range(number("a number of tensors", MAX_TENSORS)):
        length = number("the length of a name", 1024)
        name = data[position : position + length].decode("utf-8", "replace")
        position += length
        chunks = number("a number of chunks", 1 << 30)
        count = number("a number of values", len(data) // 4)
        if position + 4 * count > len(data):
            raise _malformed(f"{path} ends inside the values of {quoted(name)}")
        values = np.frombuffer(data, "<f4", count, position).astype(np.float32)
        position += 4 * count
        check_sums(values, chunks, f"{path}: {quoted(name)}")
        entries[name] = Entry(values.reshape(1, -1), np.array([chunks], np.float32))
    return entries


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A weight, and the names in block 0 under which ``gguf`` may know it, each with its own block."""

    weight: str
    inputs: int
    names: tuple[tuple[str, str], ...]
    expert: int | None


def _named(entries: Mapping[str, Entry], steps: list[Step]) -> dict[str, InputSums]:
    """The entries under the weights' names, by the architecture of llama.cpp's that explains most of them."""
    wanted = [_wanted(step) for step in steps]
    best: dict[str, InputSums] = {}
    for names in _name_maps():
        found = {each.weight: sums for each in wanted if (sums := _sums_of(each, entries, names)) is not None}
        if len(found) > len(best):
            best = found
    return best


def _wanted(step: Step) -> _Wanted:
    names: dict[tuple[str, str], None] = {}
    experts = [match for name in (step.weight.name, step.name) if (match := _EXPERT.search(name))]
    for name in dict.fromkeys((step.weight.name, step.name, *step.weight.sources)):
        for plain in _spellings(_EXPERT.sub("", name).removesuffix(".weight")):
            block = _NUMBER.search(plain)
            names[_NUMBER.sub("0", plain, count=1), block[0] if block else ""] = None
    expert = int(experts[0][1]) if experts else None
    return _Wanted(step.weight.name, step.weight.shape[1], tuple(names), expert)


def _sums_of(wanted: _Wanted, entries: Mapping[str, Entry], names: Mapping[str, str]) -> InputSums | None:
    for name, block in wanted.names:
        key = names.get(name)
        entry = entries.get(key.replace("blk.0.", f"blk.{block}.", 1) + ".weight") if key is not None else None
        if entry is None or entry.sum2.size % wanted.inputs:
            continue
        rows = entry.sum2.reshape(-1, wanted.inputs)
        row = wanted.expert or 0
        if row < len(rows) and (wanted.expert is not None or len(rows) == 1):
            return InputSums(rows[row], int(entry.counts[row if entry.counts.size > 1 else 0]))
    return None


def _spellings(name: str) -> list[str]:
    """A name with and without the modules that wrap a language model, as one class or another has them."""
    found = [name]
    rest = name
    while (wrapper := next((each for each in _WRAPPERS if rest.startswith(each)), None)) is not None:
        rest = rest.removeprefix(wrapper)
        found.append(rest)
    return [*found, f"model.{rest}", f"transformer.{rest}"]


@cache
def _name_maps() -> tuple[Mapping[str, str], ...]:
    """Of each architecture that llama.cpp knows: a module's name in transformers, in block 0 → llama.cpp's."""
    import gguf

    from qz.quantize.libraries.gguf_names import untouched

    maps = []
    for architecture in gguf.MODEL_ARCH:
        with untouched():
            mapping = gguf.get_tensor_name_map(architecture, 1).mapping
        maps.append({name: key for name, (_, key) in mapping.items()})
    return tuple(maps)


def _malformed(why: str) -> Malformed:
    return Malformed("imatrix-malformed", f"{why}. Download it again, or make it with llama.cpp's llama-imatrix.")
