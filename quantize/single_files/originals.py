"""The tensors of a folder in diffusers' layout as those of the model's original code: diffusers' converter, inverted.

The converter is run on the original names, without values. What it makes of which part of them, read backwards, says
what each original tensor is put together from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qz import Unsupported
from qz.formats.malformed import quoted
from qz.formats.tensors.decoded import Decoded, StoredTensor
from qz.formats.tensors.safetensors import BITS
from qz.quantize.libraries.architecture import TensorSpec, torch_name
from qz.quantize.libraries.importing import lean_imports
from qz.quantize.libraries.importing.boundary import CONVERTER_ERRORS, describe
from qz.quantize.libraries.importing.isolation import isolated
from qz.quantize.libraries.importing.untrusted_config import without_code
from qz.quantize.single_files.names import LAYOUTS, Layout
from qz.quantize.single_files.tensors import one_of, part_of


@dataclass(frozen=True, slots=True)
class Part:
    """``count`` values of a tensor in diffusers' names, from ``start`` on."""

    name: str
    start: int
    count: int


def original_specs(class_name: str, tensors: Mapping[str, TensorSpec], where: str) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes in the original code. Raises Unsupported for a class whose names are not known, and for
    parts of one tensor that do not fit together."""
    layout = LAYOUTS.get(class_name)
    if layout is None:
        raise Unsupported(
            f"{where}: how the original code names the tensors of {class_name} is not known to qz, only that of "
            f"{', '.join(sorted(LAYOUTS))}. Write diffusers' layout, or quantize the model's original file."
        )
    return joined_specs(layout, tensors, where)


def joined_specs(layout: Layout, tensors: Mapping[str, TensorSpec], where: str) -> dict[str, TensorSpec]:
    """The same with the names of a layout."""
    found: dict[str, TensorSpec] = {}
    for name, spec in tensors.items():
        original = layout.original(name)
        before = found.get(original)
        if before is None:
            found[original] = spec
            continue
        if before.dtype != spec.dtype or before.shape[1:] != spec.shape[1:] or not spec.shape:
            raise Unsupported(
                f"{where}: {quoted(name)} is a part of {quoted(original)} in the original code, and has another dtype "
                "or width than the other parts. Write diffusers' layout."
            )
        found[original] = TensorSpec(spec.dtype, (before.shape[0] + spec.shape[0], *spec.shape[1:]))
    return found


def inverted(
    class_name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], where: str
) -> dict[str, tuple[TensorSpec, tuple[Part, ...]]]:
    """Each original tensor, and the parts that it has, one after the other.

    Raises Unsupported where diffusers' converter does not make exactly ``tensors`` of them.
    """
    originals = original_specs(class_name, tensors, where)
    harmless, _ = without_code(config)
    refusal = (
        f"{where}: diffusers' converter for {class_name} cannot be inverted for this model: {{}}. Write diffusers' "
        "layout."
    )
    with lean_imports.lean_imports(), isolated():
        from qz.quantize.libraries.diffusers import single_file

        try:
            made = single_file.convert(class_name, harmless, originals)
        except CONVERTER_ERRORS as error:
            raise Unsupported(refusal.format(describe(error))) from error
    unlike = sorted(made.keys() ^ tensors.keys()) or [
        name for name, each in made.items() if each.shape != tensors[name].shape
    ]
    if unlike:
        raise Unsupported(refusal.format(f"it makes something else of {quoted(unlike[0])}"))
    parts: dict[str, dict[int, Part]] = {name: {} for name in originals}
    for name, each in made.items():
        if not isinstance(each.content, tuple):
            raise Unsupported(refusal.format(f"{quoted(name)} is in another order there"))
        begin = 0
        for piece in each.content:
            parts[piece.source][piece.start] = Part(name, begin, piece.count)
            begin += piece.count
    found = {}
    for name, spec in originals.items():
        end = 0
        for start, part in sorted(parts[name].items()):
            if start != end:
                break
            end += part.count
        if end != math.prod(spec.shape):
            raise Unsupported(refusal.format(f"only a part of {quoted(name)} is used"))
        found[name] = (spec, tuple(part for _, part in sorted(parts[name].items())))
    return found


def original_tensors(
    class_name: str, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], where: str
) -> dict[str, StoredTensor | Decoded]:
    """Stored tensors in diffusers' names as the original ones, where they lie."""
    specs = {name: TensorSpec(torch_name(tensor.dtype, name), tensor.shape) for name, tensor in tensors.items()}
    found: dict[str, StoredTensor | Decoded] = {}
    for name, (spec, parts) in inverted(class_name, config, specs, where).items():
        dtype = tensors[parts[0].name].dtype
        width = BITS[dtype] // 8
        places = [part_of(tensors[part.name], part.start, part.count, width) for part in parts]
        found[name] = one_of(name, dtype, spec.shape, places)
    return found
