"""A GGUF file as a checkpoint: its tensors under llama.cpp's names. What they are called elsewhere, a library says."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from qz.formats.checkpoint.problems import Problem, Problems
from qz.formats.checkpoint.survey import GGUF, Checkpoint
from qz.formats.files.folder import PIPELINE_INDEX, Folder, read_at
from qz.formats.malformed import UNSAFE_TEXT, Malformed, quoted, quoted_names
from qz.formats.tensors.decoded import CODES, Decoded, StoredTensor
from qz.formats.tensors.encodings import Blocks
from qz.formats.tensors.gguf_header import GgufHeader, GgufTensor, gguf_names, joined_header, read_gguf_header

if TYPE_CHECKING:
    pass

PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
"""ggml's types that are values, and what safetensors calls them."""
TYPES = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""ggml's types in blocks: name, values and bytes of a block; those that the gguf package dequantizes from a
tensor alone."""
_KINDS = {name: number for number, name in PLAIN.items()}
_WIDTHS = {"F32": 4, "F16": 2, "F64": 8, "BF16": 2}
_LLAMA_CPP = re.compile(r"tokenizer\.|token_embd\.|(?:\w+\.)?blk\.\d+\.")
"""What some name of a language model's file in GGUF begins with, of its metadata or tensors, and none of a diffusion
model's."""
_SHAPE = "comfy.gguf.orig_shape."
"""Before the name of a tensor: the shape it had before its values were put into rows of whole blocks."""
_PART = re.compile(r"-\d{5}-of-(?P<count>\d{5})\.gguf\Z", re.IGNORECASE)
_MOST_PARTS = 10_000
_BESIDE = re.compile(r"(?:mmproj|imatrix).*|.*[.-]imatrix\.gguf", re.IGNORECASE)


def gguf_files(folder: Folder) -> list[str]:
    """Models in GGUF in a folder that has no other weights."""
    names = folder.sizes()
    if folder.named_file is not None:
        return [folder.named_file] if folder.named_file.lower().endswith(".gguf") else []
    others = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    if any(name.endswith(others) for name in names) or PIPELINE_INDEX in names:
        return []
    return [name for name in names if name.lower().endswith(".gguf") and not _BESIDE.fullmatch(name)]


def is_denoiser(folder: Folder, file: str) -> bool:
    """Whether a file in GGUF is a diffusion model's, as of ComfyUI and diffusers: without a vocabulary or llama.cpp's
    names. A malformed file may be one: that is reported when it is read."""
    names = gguf_names(read_at(folder, file), folder.sizes().get(file, 0), f"{folder.location}/{file}")
    try:
        return not any(map(_LLAMA_CPP.match, names))
    except Malformed:
        return True


def survey_gguf(
    folder: Folder, files: list[str], variant: str | None = None
) -> tuple[Checkpoint | None, tuple[Problem, ...]]:
    """The model of ``files`` that has ``variant`` in its name as a checkpoint, and what is wrong with it; one file, or
    all that it is split into."""
    problems = Problems(folder.location)
    if variant is not None:
        wanted = re.compile(rf"(?:.*[.\-])?{re.escape(variant)}(?:-\d{{5}}-of-\d{{5}})?\.gguf", re.IGNORECASE)
        there, files = files, [name for name in files if wanted.fullmatch(name)]
        if not files:
            problems.add("variant-missing", variant, name=quoted(variant), there=", ".join(there[:8]))
            return None, problems.worst_first()
    if len({_PART.sub("", name) for name in files}) != 1:
        problems.add("gguf-several", files[0], names=quoted_names(files))
        return None, problems.worst_first()
    files = sorted(files)
    if missing := _missing_parts(files):
        problems.add("gguf-parts", files[0], names=quoted_names(missing))
        return None, problems.worst_first()
    sizes = {file: folder.sizes().get(file, 0) for file in files}
    tensors: dict[str, StoredTensor | Decoded] = {}
    headers: list[GgufHeader] = []
    for number, file in enumerate(files):
        try:
            headers.append(_header(folder, file, number, len(files)))
            _add_tensors(tensors, headers[-1], file, sizes[file], f"{folder.location}/{file}")
        except Malformed as error:
            problems.add_error(error, file, missing="weights-missing")
            return None, problems.worst_first()
    if not tensors:
        text = f"{folder.location}/{files[0]} is not a valid GGUF file: it has no tensors. Download it again."
        problems.add_error(Malformed("gguf-malformed", text), files[0], missing="weights-missing")
        return None, problems.worst_first()
    names = (*headers[0].metadata, *headers[0].lengths, *tensors)
    return Checkpoint(
        folder=folder,
        config=_config(headers[0]),
        library="transformers" if any(map(_LLAMA_CPP.match, names)) else "diffusers",
        architecture=None,
        variant=None,
        files=tuple(files),
        sizes=sizes,
        tensors=tensors,
        encoded_as=GGUF,
    ), problems.worst_first()


def _missing_parts(files: list[str]) -> list[str]:
    """Names of the files of a split model that are not there."""
    match = _PART.search(files[0])
    if match is None:
        return []
    count, stem = int(match["count"]), files[0][: match.start()]
    if not 0 < count <= _MOST_PARTS:
        return files
    wanted = [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    there = {name.lower() for name in files}
    return [name for name in wanted if name.lower() not in there]


def _header(folder: Folder, file: str, number: int, count: int) -> GgufHeader:
    """The header of the file of this number, from 0 on, of so many."""
    where = f"{folder.location}/{file}"
    header = read_gguf_header(read_at(folder, file), folder.sizes().get(file, 0), where)
    said = [header.metadata.get(key, default) for key, default in (("split.no", number), ("split.count", count))]
    if said != [number, count] and count > 1:
        why = f"it says that it is file {said[0]} of {said[1]}, counted from 0, not file {number} of {count}"
        raise Malformed("gguf-malformed", f"{where} does not belong there: {why}. Download all files again.")
    return header


def _add_tensors(
    tensors: dict[str, StoredTensor | Decoded], header: GgufHeader, file: str, size: int, where: str
) -> None:
    for name, tensor in header.tensors.items():
        if name in tensors:
            raise Malformed("gguf-malformed", f"{where} holds {quoted(name)}, as another file does. Download it again.")
        tensors[name] = _stored(tensor, file, size, where, header.metadata.get(_SHAPE + name))


def joined_gguf_header(checkpoint: Checkpoint) -> tuple[bytes, int | None]:
    """The header of a checkpoint in GGUF, as if it were in one file, and how many tokens a vocabulary has that is too
    long to be in it: all that a library needs to see of it."""
    headers = [
        _header(checkpoint.folder, file, number, len(checkpoint.files)) for number, file in enumerate(checkpoint.files)
    ]
    entries = [bytearray(stop - start) for start, stop in headers[0].kept]
    for entry, (start, _) in zip(entries, headers[0].kept, strict=True):
        checkpoint.folder.read_into(checkpoint.files[0], start, memoryview(entry))
    tensors = (each for header in headers for each in header.tensors.values())
    return joined_header(entries, tensors, headers[0].alignment), headers[0].lengths.get("tokenizer.ggml.tokens")


def _config(header: GgufHeader) -> dict[str, Any]:
    """What is shown of it until a library has made a config of the metadata."""
    return {"model_type": GGUF, "gguf": str(header.metadata.get("general.architecture", ""))}


def in_blocks(tensor: StoredTensor | Decoded) -> tuple[StoredTensor, Blocks]:
    """A tensor of such a file as it is stored, and its blocks; plain values are blocks of one."""
    if isinstance(tensor, Decoded):
        assert isinstance(tensor.encoding, Blocks)
        return tensor.parts[CODES], tensor.encoding
    return tensor, Blocks(_KINDS[tensor.dtype], 1, _WIDTHS[tensor.dtype])


def _stored(tensor: GgufTensor, file: str, size: int, where: str, before: object) -> StoredTensor | Decoded:
    """``before``: what the metadata say of its shape before its values were put into rows of whole blocks."""
    name, shape = tensor.name, tuple(reversed(tensor.shape))
    if not name or UNSAFE_TEXT.search(name):
        raise Malformed("gguf-malformed", f"{where} has a tensor named {quoted(name)}. Download it again.")
    count = math.prod(shape)
    if tensor.type in PLAIN:
        nbytes = count * _WIDTHS[PLAIN[tensor.type]]
    elif tensor.type in TYPES:
        _, values, width = TYPES[tensor.type]
        if not shape or shape[-1] % values:
            why = f"{quoted(name)} has rows whose length is not a multiple of {values}"
            raise Malformed("gguf-malformed", f"{where} is not a valid GGUF file: {why}. Download it again.")
        nbytes = count // values * width
    else:
        raise Malformed(
            "gguf-type",
            f"{where} holds {quoted(name)} in ggml's type {tensor.type}, which the libraries cannot read. Use a file "
            "of another quantization, or the original weights.",
        )
    if tensor.offset + nbytes > size:
        raise Malformed("truncated", f"{where} ends before {quoted(name)} does: it is truncated. Download it again.")
    if before is not None:
        found = _shape_before(before, count)
        if found is None:
            why = f"{quoted(name)} does not have as many values as its {_SHAPE[:-1]} says"
            raise Malformed("gguf-malformed", f"{where} is not a valid GGUF file: {why}. Download it again.")
        shape = found
    if tensor.type in PLAIN:
        return StoredTensor(name, PLAIN[tensor.type], shape, file, tensor.offset, nbytes)
    stored = StoredTensor(name, TYPES[tensor.type][0], shape, file, tensor.offset, nbytes)
    return Decoded(name, "F32", shape, {CODES: stored}, Blocks(tensor.type, *TYPES[tensor.type][1:]))


def _shape_before(said: object, count: int) -> tuple[int, ...] | None:
    """The shape that metadata give a tensor of ``count`` values; None if it is none of those."""
    if not isinstance(said, list) or not all(isinstance(each, int) and each >= 0 for each in said):
        return None
    return tuple(said) if math.prod(said) == count else None
