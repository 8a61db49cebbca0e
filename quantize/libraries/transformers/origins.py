"""Where each tensor of a transformers model comes from: renamed, merged or split when it is loaded, or tied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qz.quantize.libraries.architecture import Conversion, TensorSpec
from qz.quantize.libraries.transformers.internals import (
    Conv1D,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    tied_weights,
)

Model = Any
"""A transformers model on the meta device."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one tensor of the model's state dict comes from."""

    sources: tuple[str, ...]
    conversion: Conversion | None = None


@dataclass(frozen=True, slots=True)
class Renamed:
    """One result of a conversion, under the name it is saved by."""

    conversion: Conversion
    state_name: str
    name: str

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {self.name: self.conversion(tensors)[self.state_name]}


@dataclass(frozen=True, slots=True)
class LoadedNames:
    """Which name of the model's state dict a checkpoint's name becomes in ``convert_and_load_state_dict_in_model``."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    state: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: Model, state: Mapping[str, torch.Tensor], quantizer: Any = None) -> LoadedNames:
        """``quantizer``: the library's, for a checkpoint that is quantized."""
        mapping = get_model_conversion_mapping(model, None, quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        return cls(renamings, converters, model.base_model_prefix, state)

    def after_loading(self, source: str) -> tuple[str, str | None]:
        """The name, and the pattern of the converter that collects it; a name of the model itself is not renamed to
        one that the model does not have."""
        name, pattern = rename_source_key(source, self.renamings, self.converters, self.prefix, self.state)
        if name not in self.state and source in self.state:
            name, pattern = rename_source_key(source, [], [], self.prefix, self.state)
        return str(name), pattern


def find_origins(model: Model, tensors: Mapping[str, TensorSpec]) -> dict[str, Origin]:
    """State dict name → its sources, by the steps of ``convert_and_load_state_dict_in_model``.

    A source that matches a converter is collected with the others of its target; any other is only renamed, and the
    first one to arrive at a name wins, as there.
    """
    names = LoadedNames.of(model, model.state_dict())
    origins: dict[str, Origin] = {}
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    by_pattern = {pattern: converter for converter in names.converters for pattern in converter.source_patterns}
    for source in sorted(tensors, key=dot_natural_key):
        name, pattern = names.after_loading(source)
        if name not in names.state:
            continue
        if pattern is None:
            origins.setdefault(name, Origin((source,)))
        else:
            groups[name].append((pattern, source))
    alike: dict[TensorSpec, torch.Tensor] = {}
    for first, members in groups.items():
        conversion = _Forward(model, by_pattern[members[0][0]], first, tuple(members))
        for spec in {tensors[source] for _, source in members} - alike.keys():
            alike[spec] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        meta = {source: alike[tensors[source]] for _, source in members}
        origin = Origin(tuple(source for _, source in members), conversion)
        origins.update(dict.fromkeys(conversion(meta), origin))
    return origins


def names_after_renaming(model: Model, sources: Iterable[str]) -> set[str]:
    """The names of the model's state dict that sources have after the class's own renamings, without a prefix that the
    loader would add or take away."""
    mapping = get_model_conversion_mapping(model, None, None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = (rename_source_key(source, renamings, converters)[0] for source in sources)
    return {str(name) for name in names if name in state}


@dataclass(frozen=True, slots=True)
class _Forward:
    """transformers' own converter for one group of checkpoint tensors, run when their data is there."""

    model: Model
    converter: Any
    first: str
    members: tuple[tuple[str, str], ...]

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        from copy import deepcopy

        converter = deepcopy(self.converter)
        for pattern, source in self.members:
            converter.add_tensor(self.first, source, pattern, tensors[source])
        converted = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def find_transposed(model: Model, origins: Mapping[str, Origin], tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Weights of ``Conv1D`` modules that are given as (out, in)."""

    found = set()
    for path, module in model.named_modules():
        origin = origins.get(f"{path}.weight") if isinstance(module, Conv1D) else None
        given = tensors[origin.sources[0]] if origin else None
        if given is not None and given.linear and given.shape == tuple(reversed(module.weight.shape)):
            found.add(f"{path}.weight")
    return found


def tie(model: Model, origins: dict[str, Origin], equal: Callable[[str, str], bool] | None) -> dict[str, Origin]:
    """Tie what ``tie_weights`` ties: on meta it leaves alone the pairs of which both sides are stored.

    Off meta it ties those whose data is equal; ``equal`` tells. Returns ``origins`` with an entry for every tied name.
    """
    for target, source in list(tied_weights(model).items()):
        if target not in origins or source not in origins:
            continue
        mine, other = origins[target].sources, origins[source].sources
        if equal is not None and mine != other and not (len(mine) == len(other) == 1 and equal(mine[0], other[0])):
            del tied_weights(model)[target]
            continue
        path, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(source))
    complete = dict(origins)
    by_parameter = {
        id(parameter): origins[name]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in origins
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in complete and id(parameter) in by_parameter:
            complete[name] = by_parameter[id(parameter)]
    return complete


def packed_elsewhere(model: Model, origins: Mapping[str, Origin], tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Sources that are quantized and whose codes the loader would have to merge, or to put where no linear layer is."""
    found: set[str] = set()
    for name, origin in origins.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if origin.conversion is not None or not (type(module) is torch.nn.Linear or isinstance(module, Conv1D)):
            found |= {source for source in origin.sources if tensors[source].linear}
    return tuple(sorted(found, key=dot_natural_key))
