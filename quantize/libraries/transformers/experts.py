"""The experts of MoE models: which parameters of a model hold them, and how they are saved when they are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qz import Unsupported
from qz.quantize.libraries.architecture import Saved, Weight
from qz.quantize.libraries.expert_layout import expert_name, router_name
from qz.quantize.libraries.transformers.internals import (
    holds_experts,
    revert_weight_conversion,
    should_convert_module,
)
from qz.quantize.libraries.transformers.origins import Model, Origin, Renamed
from qz.quantize.methods import BLOCK_SIZE, Method

LISTED = "gpt_oss"
"""The model type whose experts are stored in 3-D and read one by one, see ``expert_layout``."""
GATE = "shared_expert_gate"
"""A linear layer with one output, which vLLM builds as one that is not quantized."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Parameters of a model that hold all experts of a layer, and how they are saved."""

    one_by_one: Mapping[str, str]
    """Saved name of one expert's weight → the parameter it belongs to."""
    whole: Mapping[str, str]
    """Saved name of a parameter that is saved in 3-D → the parameter."""
    layers: tuple[str, ...]
    """Paths of the modules."""

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.one_by_one.values(), *self.whole.values())))


def find_experts(model: Model, skips: Sequence[str] = ()) -> Experts:
    """The experts of a model, but for layers of which ``skips`` names one by the library's rules: all experts of a
    layer are quantized, or none."""
    one_by_one: dict[str, str] = {}
    whole: dict[str, str] = {}
    layers: list[str] = []
    for path, module in model.named_modules():
        if not holds_experts(module):
            continue
        found: dict[bool, dict[str, str]] = {True: {}, False: {}}
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                saved = revert_weight_conversion(model, {f"{path}.{leaf}": parameter})
                single = all(tensor.ndim == 2 for tensor in saved.values())
                found[single] |= dict.fromkeys(saved, f"{path}.{leaf}")
        paths = (path, *(name.removesuffix(".weight") for each in found.values() for name in each))
        if skips and not all(should_convert_module(each, list(skips)) for each in paths):
            continue
        layers.append(path)
        one_by_one |= found[True]
        whole |= found[False]
    return Experts(one_by_one, whole, tuple(layers))


def routers(model: Model, layers: Sequence[str]) -> list[str]:
    """Paths of what chooses among the experts of ``layers`` and is no linear layer: other programs take it for one."""
    blocks = {path.rpartition(".")[0] for path in layers}
    found = []
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            path.rpartition(".")[0] in blocks
            and isinstance(weight, torch.nn.Parameter)
            and weight.ndim == 2
            and not isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
        ):
            found.append(path)
    return found


def quantize_experts(
    model: Model, saved: Sequence[Saved], origins: Mapping[str, Origin], experts: Experts, method: Method, dtype: str
) -> tuple[Saved, ...]:
    """``saved`` with the experts quantized: one by one where the class saves them so, and for gpt-oss; otherwise as
    bitsandbytes saves a parameter that it quantized (``replace_parameter_4bit``), with companions beside it.

    Raises Unsupported for a model without experts, and where an expert is no whole number of blocks.
    """
    listed = model.config.model_type == LISTED
    if not experts.layers:
        raise Unsupported(
            f"{type(model).__name__} has no experts that transformers leaves alone (or all are skipped): leave out "
            "--experts."
        )
    found: list[Saved] = []
    for each in saved:
        if each.name in experts.one_by_one:
            weight = replace(each.weight, quantized=True, dtype=dtype)
            found += _parts(each.name.removesuffix(".weight") + ".", weight, method)
        elif listed and ".experts." in each.name:
            found += _listed(each, method, dtype)
        elif listed and ".router." in each.name:
            name = router_name(each.name)
            found.append(replace(each, name=name, weight=replace(each.weight, name=name)))
        elif not each.part and (state_name := experts.whole.get(each.name)) is not None:
            origin = origins[state_name]
            shape = tuple(model.get_parameter(state_name).shape)
            conversion = Renamed(origin.conversion, state_name, each.name) if origin.conversion else None
            weight = Weight(each.name, origin.sources, dtype, shape, quantized=True, conversion=conversion)
            found += _parts("", weight, method, each.name)
        else:
            found.append(each)
    return tuple(found)


def _listed(each: Saved, method: Method, dtype: str) -> Iterator[Saved]:
    """The single experts' weights, or biases, of one of gpt-oss' parameters."""
    count, *shape = each.shape
    for number in range(count):
        name = expert_name(each.name, number)
        if len(shape) == 1:
            weight = replace(each.weight, name=name, shape=tuple(shape), index=number)
            yield replace(each, name=name, shape=tuple(shape), weight=weight, nbytes=each.nbytes // count, storage=0)
        else:
            rows, columns = shape
            weight = replace(
                each.weight,
                name=name,
                shape=(columns, rows),
                dtype=dtype,
                quantized=True,
                transposed=True,
                index=number,
            )
            yield from _parts(name.removesuffix("weight"), weight, method)


def _parts(prefix: str, weight: Weight, method: Method, name: str = "") -> Iterator[Saved]:
    """What a quantized weight is saved as; ``name`` takes the place of the ``weight`` in each part's name."""
    of_one = weight.count // (weight.shape[0] if len(weight.shape) == 3 else 1)
    if of_one % BLOCK_SIZE:
        raise Unsupported(
            f"{weight.name}: an expert of {of_one:,} values is no whole number of blocks of {BLOCK_SIZE}. No loader "
            "takes such experts quantized. Leave out --experts."
        )
    for part in method.parts(weight.shape, weight.dtype):
        saved_name = name + part.suffix.removeprefix("weight") if name else prefix + part.suffix
        yield Saved(saved_name, part.dtype, part.shape, weight, part.nbytes, part.suffix, part.variable)
