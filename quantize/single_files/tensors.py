"""The tensors of a model as they lie in a file in other names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qz import Unsupported
from qz.counted import counted
from qz.formats.checkpoint.gguf import survey_gguf
from qz.formats.checkpoint.problems import require_none
from qz.formats.checkpoint.survey import Checkpoint, survey_file
from qz.formats.files.folder import Folder
from qz.formats.malformed import Malformed, quoted
from qz.formats.sources.encoded import plain_checkpoint
from qz.formats.tensors.decoded import CODES, Decoded, StoredTensor
from qz.formats.tensors.encodings import Identity, Joined, Strided, joined_part
from qz.formats.tensors.safetensors import BITS
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, TensorSpec, torch_name

if TYPE_CHECKING:
    from qz.quantize.libraries.diffusers.tracing import Converted

FLOATS_8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
PREFIX = re.compile(
    r"(?:model\.diffusion_model|first_stage_model|vae|audio_vae|control_model|model_ema|cond_stage_model\.[a-z]+"
    r"|conditioner\.embedders\.\d+\.[a-z]+|text_encoders\.\w+\.[a-z]+)\."
)
"""What names of a part of a pipeline begin with."""
_SCALE = re.compile(r".*(?:scale_weight|weight_scale(?:_inv|_2)?|scaled_fp8|comfy_quant)")
"""Names of scales of 8-bit floats, and of what says that there are some."""


@dataclass(frozen=True)
class OriginalFile:
    """One file and its tensors, by their names in it."""

    folder: Folder
    name: str
    tensors: Mapping[str, StoredTensor | Decoded]
    metadata: Mapping[str, str]
    encoded_as: str | None = None
    left_out: tuple[str, ...] = ()
    """What was no weight, as in ``Checkpoint``."""

    @property
    def location(self) -> str:
        return f"{self.folder.location}/{self.name}"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(_torch_name(tensor), tensor.shape) for name, tensor in self.tensors.items()}

    def unused(self, made: Iterable[Converted]) -> list[str]:
        """Names of the tensors that are no part of what was made.

        Raises Malformed where one has the name of a part under another prefix: there are two candidates for it; and
        Unsupported for a scale, without which the weights would be others.
        """
        used = {name for each in made for name in each.sources}
        left = sorted(set(self.tensors) - used)
        prefixes = {prefix_of(name) for name in used} | {"model_ema."}
        theirs = {without_prefix(name): name for name in used}
        for name in left:
            other = theirs.get(without_prefix(name)) if prefix_of(name) not in prefixes else None
            if other is not None:
                raise Malformed(
                    "tensor-twice",
                    f"{self.location} has the same tensor as {quoted(name)} and as {quoted(other)}, and which is meant "
                    "cannot be told. Remove one of them.",
                )
            if _SCALE.fullmatch(name):
                raise Unsupported(
                    f"{self.location} has scales ({quoted(name)}) of weights in a form that qz does not know, without "
                    "which they would be others. Use the bfloat16, fp8 or GGUF file."
                )
        return left

    def plain(self, name: str) -> StoredTensor:
        """One that is stored as its values."""
        tensor = self.tensors[name]
        assert isinstance(tensor, StoredTensor)
        return tensor

    def stored_as(self, name: str, converted: Converted) -> StoredTensor | Decoded:
        """A tensor of the model as it lies in the file."""
        if any(isinstance(self.tensors[each], Decoded) for each in converted.sources):
            from qz.quantize.single_files.encoded import put_together

            return put_together(name, converted, self.tensors, self.location)
        dtype = {name: own for own, name in FLOATS_8.items()}.get(converted.dtype) or SAFETENSORS_NAMES[converted.dtype]
        return _stored_as(name, dtype, converted, self)


def read_original(folder: Folder, file: str) -> OriginalFile:
    """The file's header. Raises MalformedInput for one that breaks the rules."""
    if file.lower().endswith(".gguf"):
        checkpoint, problems = survey_gguf(folder, [file])
        require_none(folder.location, problems)
        assert checkpoint is not None  # otherwise a problem was reported
        return OriginalFile(folder, file, checkpoint.tensors, {}, checkpoint.encoded_as)
    stored, metadata, problems = survey_file(folder, file)
    require_none(folder.location, problems, but=("original-layout",))
    packed = next((name for name in stored if ".quant_state.bitsandbytes__" in name), None)
    if packed is not None:
        raise Unsupported(
            f"{folder.location}/{file} is already quantized with bitsandbytes ({quoted(packed)}), which qz reads in "
            "diffusers' layout only. Start from the original file, or from a quantized folder in that layout."
        )
    if not any(map(_SCALE.fullmatch, stored)):
        return OriginalFile(folder, file, stored, metadata)
    alone = Checkpoint(folder, {}, "diffusers", None, None, (file,), {file: folder.sizes()[file]}, stored)
    plain = plain_checkpoint(alone)
    return OriginalFile(folder, file, plain.tensors, metadata, plain.encoded_as, plain.left_out)


def without_prefix(name: str) -> str:
    """A tensor's own name, without the prefix of its part of a pipeline."""
    return PREFIX.sub("", name, count=1)


def prefix_of(name: str) -> str:
    """What stands before a tensor's own name in the file."""
    found = PREFIX.match(name)
    return found.group() if found else ""


def require_one_prefix(component: str, made: Mapping[str, Converted], where: str) -> None:
    """Raise Malformed if the tensors of one model come from under several prefixes: two models were mixed."""
    found: dict[str, list[str]] = {}
    for each in made.values():
        for name in each.sources:
            found.setdefault(prefix_of(name), []).append(name)
    if len(found) > 1:
        told = ", ".join(f"{counted(len(names), 'tensor')} such as {quoted(names[0])}" for names in found.values())
        raise Malformed(
            "prefixes-mixed",
            f"{where}: the tensors of {component} lie under several prefixes: {told}. Get a file that was not put "
            "together from several.",
        )


def _torch_name(tensor: StoredTensor | Decoded) -> str:
    return FLOATS_8.get(tensor.dtype) or torch_name(tensor.dtype, tensor.name)


def _stored_as(name: str, dtype: str, converted: Converted, file: OriginalFile) -> StoredTensor | Decoded:
    from qz.quantize.libraries.diffusers import tracing

    content, width = converted.content, BITS[dtype] // 8
    if isinstance(content, tracing.Identity):
        first = next(iter(file.tensors.values()))
        nothing = StoredTensor(name, dtype, (0,), first.file, first.offset, 0)
        return Decoded(name, dtype, converted.shape, {CODES: nothing}, Identity())
    if isinstance(content, tracing.View):
        source = file.plain(content.source)
        whole = part_of(source, content.start, source.nbytes // width - content.start, width)
        return Decoded(name, dtype, converted.shape, {CODES: whole}, Strided(content.strides))
    parts = [part_of(file.plain(piece.source), piece.start, piece.count, width) for piece in content]
    return one_of(name, dtype, converted.shape, parts)


def part_of(tensor: StoredTensor, start: int, count: int, width: int) -> StoredTensor:
    """``count`` values of ``width`` bytes from ``start`` on."""
    return tensor._replace(offset=tensor.offset + start * width, nbytes=count * width, shape=(count,))


def one_of(name: str, dtype: str, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> StoredTensor | Decoded:
    """The tensor whose values are those of ``parts``, one after the other, which are not moved."""
    if len(parts) == 1:
        return StoredTensor(name, dtype, shape, parts[0].file, parts[0].offset, parts[0].nbytes)
    return Decoded(name, dtype, shape, {joined_part(n): part for n, part in enumerate(parts)}, Joined())
