"""What ``save_pretrained`` writes of a transformers model: which tensors, under which names, computed from what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from qz import Unsupported
from qz.quantize.libraries.architecture import SAFETENSORS_NAMES, Saved, TensorSpec, Weight
from qz.quantize.libraries.transformers.internals import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    loading_quantizer,
    rename_source_key,
    revert_weight_conversion,
    storage_of,
    weight_conversions,
)
from qz.quantize.libraries.transformers.origins import LoadedNames, Model, Origin, Renamed
from qz.quantize.methods import Method

Entries = Mapping[str, tuple[str, str, bool, torch.Tensor]]
"""Name in the state dict after quantization → (weight's name, part, variable, tensor on meta)."""


def saved_tensors(
    model: Model,
    entries: Entries,
    quantized: Mapping[str, Weight],
    origins: Mapping[str, Origin],
    tensors: Mapping[str, TensorSpec],
    transposed_weights: set[str],
    method: Method | None,
) -> tuple[tuple[Saved, ...], tuple[str, ...]]:
    """The output's tensors in the order and under the names of ``save_pretrained``.

    A renamed tensor is the same object before and after ``revert_weight_conversion``. What else comes out of it was
    merged or split back: copied straight from the checkpoint when that has it under the same name and shape (fused
    experts), computed otherwise. Where quantized data itself would be merged, transformers writes what it cannot load
    (facts: one-to-many conversions onto linears); then the model's own names are used.
    """
    by_identity = {id(tensor): name for name, (_, _, _, tensor) in entries.items()}
    reverted = _revert(model, {name: tensor for name, (_, _, _, tensor) in entries.items()})
    notes: tuple[str, ...] = ()
    names = {by_identity[id(tensor)]: name for name, tensor in reverted.items() if id(tensor) in by_identity}
    if method is not None and (reason := _unusable(_Reloaded.of(model, entries, method), names)) is not None:
        notes = (f"saved under the model's own parameter names: {reason}",)
        names = _own_names(_Reloaded.of(model, entries, method))
        reverted = {names[name]: entries[name][3] for name in sorted(entries, key=dot_natural_key)}
    merged: dict[str, _Backward] | None = None
    storages = _shared_storages(reverted.values())
    saved = []
    for (name, tensor), storage in zip(reverted.items(), storages, strict=True):
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        state_name = by_identity.get(id(tensor))
        owner, part, variable, _ = entries[state_name] if state_name is not None else (name, "", False, None)
        if part:
            weight = quantized[owner.removesuffix(".weight")]
        elif state_name is not None:
            origin = origins[state_name]
            conversion = Renamed(origin.conversion, state_name, name) if origin.conversion else None
            transposed = state_name in transposed_weights
            weight = Weight(
                name, origin.sources, dtype, shape, transposed=transposed, conversion=conversion, parameter=state_name
            )
        elif name in tensors and tensors[name].shape == shape:
            weight = Weight(name, (name,), dtype, shape)
        else:
            if merged is None:
                merged = _merged(model, {name: entries[name][3] for name in entries if name not in names}, origins)
            weight = Weight(name, merged[name].sources, dtype, shape, conversion=merged[name])
        saved.append(Saved(name, SAFETENSORS_NAMES[dtype], shape, weight, tensor.nbytes, part, variable, storage))
    return tuple(saved), notes


def _shared_storages(tensors: Iterable[torch.Tensor]) -> list[int]:
    """For each tensor the number of the storage that it shares with others, from 1 on; 0 for one of its own."""
    storages = [storage_of(tensor) for tensor in tensors]
    counts = Counter(storages)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(each, len(numbers) + 1) if counts[each] > 1 else 0 for each in storages]


@dataclass(frozen=True, slots=True)
class _Reloaded:
    """Under which names the library finds the parts of quantized weights again."""

    model: Model
    entries: Entries
    loaded: LoadedNames

    @classmethod
    def of(cls, model: Model, entries: Entries, method: Method) -> _Reloaded:
        return cls(model, entries, LoadedNames.of(model, model.state_dict(), loading_quantizer(method.config())))

    def is_loaded_from(self, saved: str, name: str) -> bool:
        """Whether what is called ``name`` in the model is loaded as that, or with its weight, from ``saved``."""
        owner, part, _, _ = self.entries[name]
        found, pattern = self.loaded.after_loading(saved)
        return found == (owner if part else name) and not (part and pattern is None)


def _unusable(reloaded: _Reloaded, names: Mapping[str, str]) -> str | None:
    """What keeps the checkpoint's ``names``, by the model's own, from being the output's; None if nothing does."""
    for name, (owner, part, _, _) in reloaded.entries.items():
        if not part:
            continue
        if name not in names:
            return "the checkpoint's names would merge quantized tensors"
        suffix = part.removeprefix("weight")
        together = names[name] == names[owner] + suffix if suffix.startswith(".") else _module(names, name, owner)
        if not together:
            return "the checkpoint's names would part quantized weights from their scales"
        if not reloaded.is_loaded_from(names[name], name):
            return f"transformers would not find {name} again under the checkpoint's name for it"
    return None


def _module(names: Mapping[str, str], name: str, owner: str) -> bool:
    """Whether two tensors are saved as those of one module."""
    return names[name].rpartition(".")[0] == names[owner].rpartition(".")[0]


def _own_names(reloaded: _Reloaded) -> dict[str, str]:
    """The names to save by where the checkpoint's will not do: the model's own, or as they were before the renamings
    that loading applies; the same way for all parts of a weight. Raises Unsupported if neither comes back."""
    model, entries = reloaded.model, reloaded.entries
    reverse = [entry.reverse_transform() for entry in weight_conversions(model)[::-1]]
    undone = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    groups: dict[str, list[str]] = defaultdict(list)
    for name, (owner, part, _, _) in entries.items():
        groups[owner if part else name].append(name)
    found: dict[str, str] = {}
    for members in groups.values():
        own = {name: name for name in members}
        before = {name: str(rename_source_key(name, undone, [], reverse=True)[0]) for name in members}
        for names in (own, before):
            if all(reloaded.is_loaded_from(saved, name) for name, saved in names.items()):
                found |= names
                break
        else:
            lost = next(name for name in members if not reloaded.is_loaded_from(name, name))
            raise Unsupported(
                f"{type(model).__name__} cannot be quantized: transformers would load {lost} under another name than "
                "it is saved by, and leave it out."
            )
    return found


def _merged(model: Model, state: dict[str, torch.Tensor], origins: Mapping[str, Origin]) -> dict[str, _Backward]:
    """For every tensor that saving computes from others: the group it is computed from."""
    reverse = [conversion.reverse_transform() for conversion in weight_conversions(model)[::-1]]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in state:
        groups[rename_source_key(name, [], converters)[0]].append(name)
    computed = {}
    for names in groups.values():
        backward = _Backward(model, {name: origins[name] for name in names})
        computed.update(dict.fromkeys(revert_weight_conversion(model, {n: state[n] for n in names}), backward))
    return computed


def _revert(model: Model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``revert_weight_conversion`` on meta; empty where merging packed data fails there, as it would at save."""
    try:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    except (ValueError, TypeError, KeyError, RuntimeError, IndexError) as error:
        if not any(tensor.dtype.itemsize == 1 for tensor in state.values()):
            raise Unsupported(
                f"transformers cannot save {type(model).__name__} under its checkpoint's names: {error}"
            ) from error
        reverted = {}
    return reverted


@dataclass(frozen=True, slots=True)
class _Backward:
    """Load-time conversions of a group of tensors, then their reversal: what saving a loaded model does."""

    model: Model
    origins: Mapping[str, Origin]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(source for origin in self.origins.values() for source in origin.sources))

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for name, origin in self.origins.items():
            if name in state:
                continue
            if origin.conversion is None:
                state[name] = tensors[origin.sources[0]]
            else:
                state.update(origin.conversion(tensors))
        reverted: Mapping[str, torch.Tensor] = revert_weight_conversion(self.model, state)
        return reverted
