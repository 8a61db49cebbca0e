"""A plan that writes one file in the names of the model's original code, for tools that take no other.

Where the model's own code fuses q, k and v, blocks of 64 values follow each other as in the parts: quantized as a
whole, the fused weight has the bytes of its quantized parts, one after the other.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from qz import Unsupported, UsageError
from qz.formats.decoded import Decoded, StoredTensor
from qz.formats.malformed import quoted
from qz.formats.safetensors import BITS
from qz.quantize.compute.arrays import elements
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, Saved, Weight
from qz.quantize.methods import BLOCK_SIZE, FourBit
from qz.quantize.planning.plan import Plan, Step, make_plan
from qz.quantize.planning.sources import stored_parts
from qz.quantize.single_files.configs import DENOISERS
from qz.quantize.single_files.originals import original_tensors

if TYPE_CHECKING:
    from qz.formats.checkpoint.survey import Checkpoint

WITHOUT_LIMIT = 1 << 62


def in_original_names(plan: Plan) -> Plan:
    """The plan of a model, to be written in one file: under the names of the single file that it comes from, or under
    those of the original code of its class.

    Raises UsageError for a source or a method that has no such form, and Unsupported for a class without such names and
    for weights that are quantized in part only.
    """
    checkpoint, method = plan.checkpoint, plan.method
    if checkpoint.library != "diffusers":
        raise UsageError(
            f"--layout single-file is for denoisers of diffusers, and {checkpoint.folder.location} is a model of "
            f"{checkpoint.library}. Leave it out."
        )
    if not isinstance(method, FourBit) or method.double_quant:
        raise UsageError(
            "--layout single-file is for nf4 and fp4 without --double-quant: the tools that read such files know no "
            "other, and doubly quantized scales of fused layers are not those of their parts."
        )
    if plan.adapters or (plan.refinement is not None and plan.refinement.importance is not None):
        raise UsageError("--layout single-file goes with neither --lora nor --importance: use one of them at a time.")
    original = checkpoint.original if checkpoint.original is not None else _from_diffusers(plan)
    owners = _owners(plan, original)
    saved: list[Saved] = []
    for name, tensor in original.items():
        if name in owners:
            saved += _saved(tensor, owners[name], method, plan)
    architecture = replace(plan.architecture, saved=tuple(saved), documents={})
    source = replace(checkpoint, tensors=original)
    made = make_plan(source, architecture, method, WITHOUT_LIMIT)
    [shard] = made.shards
    file = f"{_stem(checkpoint)}-{method.name}.safetensors"
    return replace(made, shards=(replace(shard, file=file),), refinement=plan.refinement)


def _from_diffusers(plan: Plan) -> dict[str, StoredTensor | Decoded]:
    """The original tensors of a folder in diffusers' layout."""
    checkpoint, tensors = plan.checkpoint, {}
    for step in plan.steps:
        [*sources] = step.sources
        if len(sources) != 1 or not isinstance(sources[0], StoredTensor):
            raise Unsupported(
                f"{checkpoint.folder.location}: {quoted(step.weight.name)} is computed from what is stored, and "
                "--layout single-file needs the plain weights. Write them first with `qz dequantize`."
            )
        tensors[step.weight.name] = sources[0]
    class_name = plan.architecture.class_name
    return original_tensors(class_name, checkpoint.config, tensors, checkpoint.folder.location)


def _stem(checkpoint: Checkpoint) -> str:
    """What the file is named after: the one that is read, or the model, not ``transformer`` as its folder may be."""
    if checkpoint.original is not None:
        return PurePath(checkpoint.files[0]).stem
    *_, parent, name = ("", "model", *re.sub(r"@[0-9a-f]+", "", checkpoint.folder.location).strip("/").split("/"))
    return parent if name in DENOISERS and parent not in ("", ".", "..") else name


def _owners(plan: Plan, original: Mapping[str, StoredTensor | Decoded]) -> dict[str, list[Step]]:
    """Of each tensor of the file, the steps that read a part of it."""
    regions = ((part, name) for name, tensor in original.items() for part in stored_parts(tensor) if part.nbytes)
    places = sorted((part.file, part.offset, name) for part, name in regions)
    owners: dict[str, list[Step]] = {}
    for step in plan.steps:
        for part in (part for source in step.sources for part in stored_parts(source) if part.nbytes):
            here = bisect_right(places, (part.file, part.offset), key=lambda place: place[:2]) - 1
            owner = places[here][2]
            if step not in owners.setdefault(owner, []):
                owners[owner].append(step)
    return owners


def _saved(tensor: StoredTensor | Decoded, steps: list[Step], method: FourBit, plan: Plan) -> list[Saved]:
    """What becomes of a tensor of the file, as of the parts of it in the model."""
    quantized = {step.weight.quantized for step in steps}
    dtypes = {step.weight.dtype for step in steps}
    sizes = [step.weight.count for step in steps]
    where = f"{plan.checkpoint.folder.location}/{tensor.file}: {quoted(tensor.name)}"
    if len(quantized) > 1 or len(dtypes) > 1:
        raise Unsupported(
            f"{where} is one layer in the file and several in the model, of which only some are quantized. Skip all of "
            f"them or none: {', '.join(sorted(step.weight.name for step in steps))}."
        )
    dtype = dtypes.pop()
    if not quantized.pop():
        weight = Weight(tensor.name, (tensor.name,), dtype, tensor.shape)
        stored = SAFETENSORS_NAMES[dtype]
        nbytes = elements(tensor.shape) * BITS[stored] // 8
        return [Saved(tensor.name, stored, tensor.shape, weight, nbytes)]
    if len(tensor.shape) != 2 or not tensor.name.endswith(".weight") or any(size % BLOCK_SIZE for size in sizes):
        raise Unsupported(
            f"{where} has the shape {list(tensor.shape)}, and its parts do not begin where a block of {BLOCK_SIZE} "
            "values does: no tool reads it quantized. Leave it out with --skip."
        )
    weight = Weight(tensor.name, (tensor.name,), dtype, tensor.shape, quantized=True)
    path = tensor.name.removesuffix(".weight")
    return [
        Saved(f"{path}.{part.suffix}", part.dtype, part.shape, weight, part.nbytes, part.suffix)
        for part in method.parts(tensor.shape, dtype)
    ]
