"""A plan that writes one file in the names of the file that it reads, for tools that take no other.

Where the model's own code fuses q, k and v, blocks of 64 values follow each other as in the parts: quantized as a
whole, the fused weight has the bytes of its quantized parts, one after the other.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from qz import Unsupported, UsageError
from qz.formats.malformed import quoted
from qz.formats.safetensors import BITS
from qz.quantize.compute.arrays import elements
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, Saved, Weight
from qz.quantize.methods import BLOCK_SIZE, FourBit
from qz.quantize.planning.plan import Plan, Step, make_plan
from qz.quantize.planning.sources import stored_parts

if TYPE_CHECKING:
    from qz.formats.checkpoint.survey import StoredTensor

WITHOUT_LIMIT = 1 << 62


def in_original_names(plan: Plan) -> Plan:
    """The plan of a single file's model, to be written under the names in that file, in one file.

    Raises UsageError for a source or a method that has no such form, and Unsupported for weights that are quantized in
    part only.
    """
    checkpoint, method = plan.checkpoint, plan.method
    if checkpoint.original is None:
        raise UsageError(
            f"--layout single-file writes the names of the file that is read, and {checkpoint.folder.location} is in "
            "diffusers' layout. Start from the original single file, with --config."
        )
    if not isinstance(method, FourBit) or method.double_quant:
        raise UsageError(
            "--layout single-file is for nf4 and fp4 without --double-quant: the tools that read such files know no "
            "other, and doubly quantized scales of fused layers are not those of their parts."
        )
    if plan.adapters or (plan.refinement is not None and plan.refinement.importance is not None):
        raise UsageError("--layout single-file goes with neither --lora nor --importance: use one of them at a time.")
    owners = _owners(plan, checkpoint.original)
    saved: list[Saved] = []
    for name, tensor in checkpoint.original.items():
        if name in owners:
            saved += _saved(tensor, owners[name], method, plan)
    architecture = replace(plan.architecture, saved=tuple(saved), documents={})
    source = replace(checkpoint, tensors=checkpoint.original)
    made = make_plan(source, architecture, method, WITHOUT_LIMIT)
    [shard] = made.shards
    file = f"{PurePath(checkpoint.files[0]).stem}-{method.name}.safetensors"
    return replace(made, shards=(replace(shard, file=file),), refinement=plan.refinement)


def _owners(plan: Plan, original: dict[str, StoredTensor]) -> dict[str, list[Step]]:
    """Of each tensor of the file, the steps that read a part of it."""
    places = sorted((tensor.offset, tensor.name) for tensor in original.values() if tensor.nbytes)
    owners: dict[str, list[Step]] = {}
    for step in plan.steps:
        for part in (part for source in step.sources for part in stored_parts(source) if part.nbytes):
            _, owner = places[bisect_right(places, part.offset, key=lambda place: place[0]) - 1]
            if step not in owners.setdefault(owner, []):
                owners[owner].append(step)
    return owners


def _saved(tensor: StoredTensor, steps: list[Step], method: FourBit, plan: Plan) -> list[Saved]:
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
