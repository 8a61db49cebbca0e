"""What a checkpoint is, as dataclasses that the table and the JSON are two renderings of: from headers alone.

Nothing here imports torch or a library of models; ``planned_figures`` asks them, where ``--plan`` wants it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from qz import QzError
from qz.formats.checkpoint.problems import Problem, Problems, worst_first
from qz.formats.checkpoint.quantization.quantization_config import Settings, read_settings
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight, part_names, read_quantized
from qz.formats.checkpoint.survey import Checkpoint, survey, survey_file
from qz.formats.files.folder import Folder
from qz.formats.files.local_folder import LocalFolder
from qz.formats.output.recorded.record import read_record
from qz.formats.sources.encoded import Encoded, read_encoded
from qz.formats.tensors.decoded import CODES, Decoded, StoredTensor
from qz.formats.tensors.safetensors import BITS
from qz.formats.tensors.shards import index_name
from qz.quantize.inspection.companions import problems_beside_model
from qz.quantize.inspection.linear_layers import FLOATS, Value, ties, values
from qz.quantize.inspection.report import File, Inspection, Origin, Quantization, Share, Tensor

if TYPE_CHECKING:
    from qz.quantize.consumers.contents import Contents

REMOTE_STATES = 16
"""How many quant states are read of a checkpoint far away: each may cost a request of its own."""


class FolderReading(NamedTuple):
    """What was read of a folder: ``checkpoint`` is None if there is none, or none that can be read."""

    folder: Folder
    checkpoint: Checkpoint | None
    weights: Mapping[str, QuantizedWeight]
    problems: tuple[Problem, ...]
    encoded: Encoded | None = None
    """What another tool made of the weights, where that is known."""

    def contents(self) -> Contents:
        """As the rules of a consumer look at it."""
        from qz.quantize.inspection.consumers import checkpoint_contents

        assert self.checkpoint is not None
        return checkpoint_contents(self.checkpoint, self.weights, self.problems)


def read_folder(
    folder: Folder, variant: str | None = None, names_class: Mapping[str, Any] | None = None
) -> FolderReading:
    """Read config, index, headers and quant states, as ``survey`` does.

    Raises only for a folder that cannot be looked into.
    """
    checkpoint, problems = survey(folder, variant, names_class)
    if checkpoint is None:
        return FolderReading(folder, None, {}, problems)
    encoded, found = read_encoded(checkpoint)
    if encoded is not None:
        return FolderReading(folder, checkpoint, {}, worst_first((*problems, *found)), encoded)
    weights, more = read_quantized(checkpoint, states=None if isinstance(folder, LocalFolder) else REMOTE_STATES)
    return FolderReading(folder, checkpoint, weights, worst_first((*problems, *more)))


def inspect_model(
    look: FolderReading, origin: Origin, *, plan: bool = False, consumers: Sequence[str] = ()
) -> Inspection:
    """What was looked at. With ``plan`` the model's library is asked, which is exact and takes seconds."""
    checkpoint = look.checkpoint
    if checkpoint is None:
        return _unread(look.folder, origin, look.problems).with_problems(problems_beside_model(look.folder, None))
    origin = origin._replace(library=checkpoint.library, architecture=checkpoint.architecture)
    found = _described(checkpoint, origin, look.weights, look.problems, look.encoded)
    if plan and not found.errors:
        from qz.quantize.inspection.planned_figures import with_plan

        found = with_plan(found, checkpoint, look.weights)
    if consumers:
        from qz.quantize.inspection.consumers import judged

        found = judged(found, look.contents(), consumers)
    return found.with_problems(problems_beside_model(look.folder, checkpoint.config))


def inspect_file(folder: Folder, name: str, origin: Origin, *, consumers: Sequence[str] = ()) -> Inspection:
    """One .safetensors file by itself: without a config, so nothing is known of a model."""
    tensors, metadata, problems = survey_file(folder, name)
    sizes = {file: size for file, size in folder.sizes().items() if file == name}
    if not tensors:
        return replace(_unread(folder, origin, problems), files=tuple(File(*each) for each in sizes.items()))
    alone = Checkpoint(folder, {}, "transformers", None, None, (name,), sizes, tensors, None, {name: metadata})
    encoded, more = read_encoded(alone)
    weights: Mapping[str, QuantizedWeight] = {}
    if encoded is None:
        weights, more = read_quantized(alone)
    more = tuple(problem for problem in more if not problem.kind.startswith("quantization-config"))
    problems = worst_first((*problems, *more))
    found = _described(alone, origin, weights, problems, encoded, estimated=False)
    if consumers:
        from qz.quantize.inspection.consumers import checkpoint_contents, judged

        found = judged(found, checkpoint_contents(alone, weights, problems, alone=True), consumers)
    return found


def _unread(folder: Folder, origin: Origin, problems: tuple[Problem, ...]) -> Inspection:
    """What can be said of a folder whose checkpoint cannot be found or read."""
    files = [File(name, size) for name, size in folder.sizes().items() if name.endswith((".safetensors", ".json"))]
    nothing: dict[str, Any] = {}
    return Inspection(origin, None, None, None, nothing, None, None, False, None, nothing, tuple(files), problems, ())


def _described(
    checkpoint: Checkpoint,
    origin: Origin,
    weights: Mapping[str, QuantizedWeight],
    problems: tuple[Problem, ...],
    encoded: Encoded | None = None,
    *,
    estimated: bool = True,
) -> Inspection:
    tensors = _tensors(checkpoint, weights) if encoded is None else _encoded_tensors(checkpoint, encoded)
    unquantized = plain(checkpoint, weights) if encoded is None else _decoded_values(encoded)
    loaded = values(checkpoint.library, checkpoint.architecture, checkpoint.config, unquantized)
    broken = any(problem.severity == "error" for problem in problems)
    settings = read_settings(checkpoint.config, Problems(""))
    quantization = _quantization(settings, weights) if encoded is None else _encoding(encoded)
    unknown = any(problem.kind == "encoding-unknown" for problem in problems)
    known = encoded is not None and encoded.method != "gguf" and not unknown  # the rule does not know GGUF's names
    estimated = estimated and (known or quantization is None)
    given = None
    if estimated and not broken:
        from qz.quantize.inspection.estimate import estimates

        given = estimates(loaded, checkpoint.library)
    held = {name: weight.parts["weight"].nbytes for name, weight in weights.items()}
    if encoded is not None:
        held = {name: tensor.nbytes for name, tensor in encoded.decoded.items()}
    footprint = sum(held.values()) + sum(value.nbytes for value in loaded if value.name not in held)
    recorded = None if broken else _recorded_footprint(checkpoint, footprint)
    return Inspection(
        source=origin,
        format=_format(checkpoint),
        parameters=sum(tensor.parameters for tensor in tensors),
        bytes=sum(checkpoint.sizes.values()),
        dtypes=_dtypes(tensors),
        quantization=quantization,
        memory_footprint=footprint if recorded is None else recorded,
        memory_footprint_exact=recorded is not None,
        estimates=given,
        ties=ties(
            checkpoint.library,
            checkpoint.architecture,
            checkpoint.config,
            checkpoint.stored if encoded is None else encoded.tensors,
        ),
        files=_files(checkpoint),
        problems=problems,
        tensors=tensors,
    )


def _format(checkpoint: Checkpoint) -> str:
    form = {".gguf": "gguf", ".bin": "pickle"}.get(PurePath(checkpoint.files[0]).suffix, "safetensors")
    return form if checkpoint.index is None else f"sharded {form}"


def plain(checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> list[Value]:
    """The tensors as they would be without quantization; what belongs to quantized weights is left out."""
    companions = part_names(weights)
    found = []
    for name, tensor in checkpoint.tensors.items():
        weight = weights.get(name)
        if weight is not None:
            dtype = FLOATS.get(weight.dtype or "float16", "F16")
            shape = weight.shape if weight.shape is not None else (weight.elements, 1)
            found.append(Value(name, dtype, shape, weight.elements * (4 if dtype == "F32" else 2)))
        elif name not in companions:
            found.append(Value(name, tensor.dtype, tensor.shape, tensor.nbytes))
    return found


def _tensors(checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> tuple[Tensor, ...]:
    owners = {part.name: weight for weight in weights.values() for part in weight.parts.values()}
    found = []
    for name, tensor in checkpoint.tensors.items():
        owner = owners.get(name)
        if owner is None:
            found.append(Tensor(name, tensor.dtype, tensor.shape, tensor.nbytes, tensor.file, math.prod(tensor.shape)))
            continue
        own = owner.name == name
        found.append(
            Tensor(
                name=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                bytes=tensor.nbytes,
                file=tensor.file,
                parameters=owner.elements if own else 0,
                quantized=owner.kind if own else None,
                original=owner.shape if own else None,
                part_of=None if own else owner.name,
            )
        )
    return tuple(found)


def _decoded_values(encoded: Encoded) -> list[Value]:
    """The tensors as they would be without another tool's quantization."""
    return [
        Value(
            name,
            tensor.dtype,
            tensor.shape,
            math.prod(tensor.shape) * BITS[tensor.dtype] // 8 if isinstance(tensor, Decoded) else tensor.nbytes,
        )
        for name, tensor in encoded.tensors.items()
    ]


def _encoded_tensors(checkpoint: Checkpoint, encoded: Encoded) -> tuple[Tensor, ...]:
    owners = {part.name: tensor for tensor in encoded.decoded.values() for part in tensor.parts.values()}
    found = []
    for tensor in _stored(checkpoint):
        name = tensor.name
        owner = owners.get(name)
        own = owner is not None and owner.parts[CODES].name == name
        values = owner.shape if owner is not None and own else tensor.shape
        found.append(
            Tensor(
                name=name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                bytes=tensor.nbytes,
                file=tensor.file,
                parameters=math.prod(values) if own or name in encoded.tensors else 0,
                quantized=encoded.method if own else None,
                original=owner.shape if owner is not None and own else None,
                part_of=None if owner is None or own else owner.parts[CODES].name,
            )
        )
    return tuple(found)


def _stored(checkpoint: Checkpoint) -> Iterator[StoredTensor]:
    for tensor in checkpoint.tensors.values():
        if isinstance(tensor, StoredTensor):
            yield tensor
        else:
            yield from tensor.parts.values()


def _encoding(encoded: Encoded) -> Quantization:
    decoded = encoded.decoded.values()
    return Quantization(
        encoded.method,
        quantized_parameters=sum(math.prod(tensor.shape) for tensor in decoded),
        quantized_tensors=len(encoded.decoded),
    )


def _dtypes(tensors: Iterable[Tensor]) -> dict[str, Share]:
    """By stored dtype, the one of most bytes first."""
    counts: dict[str, list[int]] = {}
    for tensor in tensors:
        count = counts.setdefault(tensor.dtype, [0, 0, 0])
        count[0] += 1
        count[1] += tensor.parameters
        count[2] += tensor.bytes
    return {dtype: Share(*counts[dtype]) for dtype in sorted(counts, key=lambda dtype: (-counts[dtype][2], dtype))}


def _quantization(settings: Settings, weights: Mapping[str, QuantizedWeight]) -> Quantization | None:
    if settings.method not in (None, "bitsandbytes"):
        return Quantization(str(settings.method))
    if not weights:
        return None
    counts: Counter[str] = Counter()
    for weight in weights.values():
        counts[weight.kind] += weight.elements
    four_bit = [weight for weight in weights.values() if weight.kind != "int8"]
    blocks = Counter(weight.blocksize for weight in four_bit if weight.blocksize is not None)
    return Quantization(
        method="+".join(kind for kind, _ in counts.most_common()),
        double_quant=any(weight.double_quant for weight in four_bit),
        block_size=blocks.most_common(1)[0][0] if blocks else None,
        compute_dtype=settings.compute_dtype if four_bit and settings.present else None,
        storage=settings.storage if four_bit and settings.present else None,
        threshold=settings.threshold if len(four_bit) < len(weights) else None,
        skipped=settings.skipped,
        quantized_parameters=sum(counts.values()),
        quantized_tensors=len(weights),
    )


def _files(checkpoint: Checkpoint) -> tuple[File, ...]:
    """config.json, the index, then the weights in their order."""
    sizes = checkpoint.folder.sizes()
    small = [name for name in sizes if name == "config.json" or name.startswith(index_name(checkpoint.library)[:-5])]
    tensors = Counter(tensor.file for tensor in checkpoint.tensors.values())
    return (
        *(File(name, sizes[name]) for name in small if name in sizes),
        *(File(name, checkpoint.sizes[name], tensors[name]) for name in checkpoint.files if name in checkpoint.sizes),
    )


def _recorded_footprint(checkpoint: Checkpoint, least: int) -> int | None:
    """The footprint that qz computed when it wrote the checkpoint, if the files still have the sizes of then."""
    try:
        record = read_record(checkpoint.folder)
    except QzError:
        return None
    if record is None:
        return None
    recorded = {file.name: file.bytes for file in record.files}
    if any(recorded.get(name) != size for name, size in checkpoint.sizes.items()):
        return None
    footprint = record.about.get("memory_footprint")
    after = footprint.get("after") if isinstance(footprint, dict) else None
    return after if type(after) is int and after >= least else None
