"""A GGUF file as a checkpoint: its tensors under llama.cpp's names. What they are called elsewhere, a library says."""

from __future__ import annotations

import math
import re
from typing import Any

from qz.formats.checkpoint.problems import Problem, Problems
from qz.formats.checkpoint.survey import GGUF, Checkpoint
from qz.formats.decoded import CODES, Decoded, StoredTensor
from qz.formats.encodings import Blocks
from qz.formats.folder import PIPELINE_INDEX, Folder
from qz.formats.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from qz.formats.malformed import UNSAFE_TEXT, Malformed, quoted, quoted_names

PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
"""ggml's types that are values, and what safetensors calls them."""
TYPES = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
}  # fmt: skip
"""ggml's types in blocks: name, values and bytes of a block; those that transformers and the gguf package both know."""
_WIDTHS = {"F32": 4, "F16": 2, "F64": 8, "BF16": 2}
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
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


def survey_gguf(
    folder: Folder, files: list[str], variant: str | None = None
) -> tuple[Checkpoint | None, tuple[Problem, ...]]:
    """The one of ``files`` that has ``variant`` in its name as a checkpoint, and what is wrong with it."""
    problems = Problems(folder.location)
    if variant is not None:
        wanted = re.compile(rf"(?:.*[.\-])?{re.escape(variant)}(?:-\d{{5}}-of-\d{{5}})?\.gguf", re.IGNORECASE)
        there, files = files, [name for name in files if wanted.fullmatch(name)]
        if not files:
            problems.add("variant-missing", variant, name=quoted(variant), there=", ".join(there[:8]))
            return None, problems.worst_first()
    if len(files) != 1:
        part = next((name for name in files if _PART.fullmatch(name)), None)
        kind = "gguf-parts" if part is not None else "gguf-several"
        problems.add(kind, files[0], names=quoted_names(files))
        return None, problems.worst_first()
    [file] = files
    where = f"{folder.location}/{file}"

    def read(offset: int, length: int) -> bytearray:
        buffer = bytearray(length)
        folder.read_into(file, offset, memoryview(buffer))
        return buffer

    size = folder.sizes().get(file, 0)
    try:
        if _PART.fullmatch(file):
            problems.add("gguf-parts", file, names=quoted(file))
            return None, problems.worst_first()
        header = read_gguf_header(read, size, where)
        if not header.tensors:
            raise Malformed(
                "gguf-malformed", f"{where} is not a valid GGUF file: it has no tensors. Download it again."
            )
        tensors = {name: _stored(tensor, file, size, where) for name, tensor in header.tensors.items()}
    except Malformed as error:
        problems.add_error(error, file, missing="weights-missing")
        return None, problems.worst_first()
    return Checkpoint(
        folder=folder,
        config=_config(header),
        library="transformers",
        architecture=None,
        variant=None,
        files=(file,),
        sizes={file: size},
        tensors=tensors,
        encoded_as=GGUF,
    ), problems.worst_first()


def _config(header: GgufHeader) -> dict[str, Any]:
    """What is shown of it until a library has made a config of the metadata."""
    return {"model_type": GGUF, "gguf": str(header.metadata.get("general.architecture", ""))}


def _stored(tensor: GgufTensor, file: str, size: int, where: str) -> StoredTensor | Decoded:
    name, shape = tensor.name, tuple(reversed(tensor.shape))
    if not name or UNSAFE_TEXT.search(name):
        raise Malformed("gguf-malformed", f"{where} has a tensor of the name {quoted(name)}. Download it again.")
    count = math.prod(shape)
    if tensor.type in PLAIN:
        nbytes = count * _WIDTHS[PLAIN[tensor.type]]
    elif tensor.type in TYPES:
        _, values, width = TYPES[tensor.type]
        if not shape or shape[-1] % values:
            why = f"{quoted(name)} has rows that are no multiple of {values} values"
            raise Malformed("gguf-malformed", f"{where} is not a valid GGUF file: {why}. Download it again.")
        nbytes = count // values * width
    else:
        raise Malformed(
            "gguf-type",
            f"{where} holds {quoted(name)} in ggml's type {tensor.type}, which transformers cannot read. Use a file of "
            "another quantization, or the original weights.",
        )
    if tensor.offset + nbytes > size:
        raise Malformed("truncated", f"{where} ends before {quoted(name)} does: it is truncated. Download it again.")
    if tensor.type in PLAIN:
        return StoredTensor(name, PLAIN[tensor.type], shape, file, tensor.offset, nbytes)
    stored = StoredTensor(name, TYPES[tensor.type][0], shape, file, tensor.offset, nbytes)
    return Decoded(name, "F32", shape, {CODES: stored}, Blocks(tensor.type, *TYPES[tensor.type][1:]))
