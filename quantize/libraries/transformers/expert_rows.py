"""Which rows of which stored matrices make up a parameter that holds all experts of a layer.

LoRAs that PEFT trains on such a parameter (``target_parameters``) change it as a whole, while checkpoints mostly have a
matrix for each expert and projection. Which is which is learned by giving the library's own reversal of its conversions
a parameter whose values tell where they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qz.formats.checkpoint.survey import Checkpoint
from qz.quantize.libraries.transformers.classes import model_class_of
from qz.quantize.libraries.transformers.internals import model_on_meta, revert_weight_conversion
from qz.quantize.libraries.transformers.meta_loading import config_in_folder

BASE_LAYER = ".base_layer"
"""What PEFT puts into the name of a module for each adapter around it."""


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """``count`` rows of one expert's matrix, from ``first`` on, which are stored as ``name``, alone or with all others.

    ``turned``: the matrix is stored transposed.
    """

    name: str
    expert: int
    first: int
    count: int
    turned: bool


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """A parameter of all experts of a layer, (experts, out, in), or (experts, in, out) where it is ``transposed``."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    stored: tuple[ExpertRows, ...]


def expert_parameters(
    checkpoint: Checkpoint, stems: Iterable[str], targets: Iterable[str]
) -> Mapping[str, ExpertParameter]:
    """For each of ``stems``, paths of modules in an adapter, the 3-D parameter that it changes, if it changes one.

    ``targets``: the ends of the names of parameters that the adapter was trained on. Several of one module are wrapped
    one in the other, in the module's order (``peft.tuners.tuners_utils.BaseTuner._inject_parameters``, 0.21).
    """
    model_class = model_class_of(checkpoint)
    model = model_on_meta(model_class.model, config_in_folder(checkpoint, model_class.config))
    wanted = tuple(targets)
    found: dict[str, ExpertParameter] = {}
    for stem in stems:
        path = stem
        while path.endswith(BASE_LAYER):
            path = path.removesuffix(BASE_LAYER)
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue  # reported when its weight is looked for
        leaves = [
            leaf
            for leaf, _ in module.named_parameters(recurse=False)
            if any(f"{path}.{leaf}" == target or f"{path}.{leaf}".endswith(f".{target}") for target in wanted)
        ]
        depth = (len(stem) - len(path)) // len(BASE_LAYER)
        if depth < len(leaves) and module.get_parameter(leaves[-1 - depth]).ndim == 3:
            name = f"{path}.{leaves[-1 - depth]}"
            transposed = bool(getattr(module, "is_transposed", False))
            shape = tuple(model.get_parameter(name).shape)
            found[stem] = ExpertParameter(name, shape, transposed, stored_rows(model, name, shape))
    return found


def stored_rows(model: Any, name: str, shape: tuple[int, ...]) -> tuple[ExpertRows, ...]:
    """Where the rows of a parameter (experts, rows, columns) are stored; its values are two columns of row numbers."""
    experts, rows, _ = shape
    numbers = torch.arange(experts * rows, dtype=torch.int64).reshape(experts, rows, 1).expand(-1, -1, 2).contiguous()
    found: list[ExpertRows] = []
    for saved, values in revert_weight_conversion(model, {name: numbers}).items():
        whole = values.ndim == 3
        for place, matrix in enumerate(values if whole else [values]):
            turned = matrix.shape[1] != 2
            column = (matrix[0] if turned else matrix[:, 0]).tolist()
            expert, first = divmod(int(column[0]), rows)
            if column != list(range(column[0], column[0] + len(column))) or (whole and expert != place):
                return ()
            found.append(ExpertRows(saved, expert, first, len(column), turned))
    return tuple(found)
