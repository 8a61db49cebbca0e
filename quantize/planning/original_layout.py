"""A plan that writes one file in the names of the model's original code, for tools that take no other.

Where the model's own code fuses q, k and v, blocks of 64 values follow each other as in the parts: quantized as a
whole, the fused weight has the bytes of its quantized parts, one after the other.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from qz import Unsupported, UsageError
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import Decoded, StoredTensor
from qz.formats.tensors.safetensors import BITS
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, Saved, TensorSpec, Weight
from qz.quantize.methods import BLOCK_SIZE, FourBit
from qz.quantize.planning.plan import Plan, Step, make_plan
from qz.quantize.planning.sources import Composed, Fused, Source, fused_parts, stored_parts, unfused
from qz.quantize.single_files.configs import DENOISERS
from qz.quantize.single_files.originals import inverted, original_tensors
from qz.quantize.single_files.tensors import prefix_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qz.formats.checkpoint.survey import Checkpoint
    from qz.quantize.planning.refinement import Refinement

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
    original = checkpoint.original if checkpoint.original is not None else _from_diffusers(plan)
    owners = _owners(plan, original)
    saved: list[Saved] = []
    for name, tensor in original.items():
        if name in owners:
            saved += _saved(tensor, owners[name], method, plan)
    architecture = replace(plan.architecture, saved=tuple(saved), documents={})
    source = replace(checkpoint, tensors=original)
    sources = {**original, **_with_loras(plan, original, owners)}
    made = make_plan(source, architecture, method, WITHOUT_LIMIT, sources)
    [shard] = made.shards
    return replace(
        made,
        shards=(replace(shard, file=f"{_stem(checkpoint)}-{method.name}.safetensors"),),
        adapters=plan.adapters,
        refinement=_of_originals(plan, owners),
    )


def _with_loras(
    plan: Plan, original: Mapping[str, StoredTensor | Decoded], owners: Mapping[str, list[Step]]
) -> dict[str, Composed]:
    """The tensors of the file that LoRAs change, each put together from what they make of the model's."""
    changed = {name for name, steps in owners.items() if any(fused_parts(step.sources[0]) for step in steps)}
    if not changed:
        return {}
    checkpoint, where = plan.checkpoint, plan.checkpoint.folder.location
    own = {step.weight.name: step for step in plan.steps}
    specs = {name: TensorSpec(step.weight.dtype, step.weight.shape) for name, step in own.items()}
    prefix = prefix_of(next(iter(changed)))
    found: dict[str, Composed] = {}
    for name, (spec, parts) in inverted(plan.architecture.class_name, checkpoint.config, specs, where).items():
        if (there := prefix + name) in changed:
            fused = {part.name: _fused(own[part.name].sources[0]) for part in parts}
            sources = tuple((fused[part.name], part.start, part.count) for part in parts)
            found[there] = Composed(there, spec.shape, sources)
    unlike = sorted(changed - found.keys()) or [
        name for name, each in found.items() if each.shape != original[name].shape
    ]
    if unlike:
        raise Unsupported(
            f"{where}: which part of {quoted(unlike[0])} the LoRA changes is not known to qz. Fuse it into diffusers' "
            "layout first, then write that as a single file."
        )
    return found


def _fused(source: Source) -> Fused:
    if isinstance(source, Fused):
        return source
    assert not isinstance(source, Composed)
    return Fused(source, ())


def _of_originals(plan: Plan, owners: Mapping[str, list[Step]]) -> Refinement | None:
    """What is known of the inputs of the tensors in the file: layers that it has in one must have the same inputs.

    Raises Unsupported if they do not. Equal sums of squares are taken to be those of equal inputs.
    """
    refined = plan.refinement
    if refined is None or refined.importance is None:
        return refined
    weights: dict[str, NDArray[np.float32]] = {}
    hessians: dict[str, str] = {}
    for name, steps in owners.items():
        models = [step.weight.name for step in steps]
        known = [refined.weights.get(each) for each in models]
        rounded = [refined.hessians.get(each) for each in models]
        first = known[0]
        alike = all(
            each is None if first is None else each is not None and np.array_equal(each, first) for each in known
        )
        if not alike or len({each is None for each in rounded}) > 1:
            raise Unsupported(
                f"{plan.checkpoint.folder.location}: {quoted(name)} is one layer in the file and several in the model, "
                f"and the inputs of {', '.join(sorted(models))} are not the same in the file of importance. Write "
                "diffusers' layout, or leave out --importance."
            )
        if first is not None:
            weights[name] = first
        if rounded[0] is not None:
            hessians[name] = rounded[0]
    return replace(refined, weights=weights, hessians=hessians)


def _from_diffusers(plan: Plan) -> dict[str, StoredTensor | Decoded]:
    """The original tensors of a folder in diffusers' layout."""
    checkpoint, tensors = plan.checkpoint, {}
    for step in plan.steps:
        [*sources] = (base for source in step.sources for base in unfused(source))
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
        nbytes = math.prod(tensor.shape) * BITS[stored] // 8
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
