"""Linear layers whose weight is read by other code than their own, found in the source of a model's classes.

A quantized layer holds packed codes where a weight was. Code that calls the layer gets its result as before; code that
reads ``self.proj.weight`` gets the codes: it fails, or goes on with nonsense. So does code that calls the layer with
``input=``: the layers of bitsandbytes have no argument of that name. Neither library knows of it.

Not counted: the device of a weight, a dtype that the code compares with that of packed weights, branches that the
module's own attributes close (training is one), methods that build, tie, load or convert a model, and those that
nothing calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from qz.quantize.libraries.architecture import torch_name
from qz.quantize.libraries.source_code.module_source import (
    ANY,
    ARGUMENT,
    FIRST,
    Path,
    Read,
    called_names,
    method_names,
    reads_of,
)
from qz.quantize.methods import Method

Module = Any
"""A ``torch.nn.Module``."""

CLOSED = frozenset((("DisentangledSelfAttention", ("in_proj",)),))
"""Reads, by class and path, in branches that are closed, though not by an attribute of the class itself: DeBERTa splits
``in_proj`` for queries of their own, which only ``z_steps`` above 1 give, and ``DebertaModel`` sets it to 0."""


def read_by_others(model: Module, linears: Iterable[str], method: Method) -> dict[str, str]:
    """Of the layers that ``method`` would quantize, those that must not be → why."""
    packed_dtype = torch_name(method.parts((1, 1), "float32")[0].dtype, "codes")
    return {path: _reason(read) for path, read in read_weights(model, linears, packed_dtype).items()}


def _reason(read: Read) -> str:
    if read.called:
        return f"called by {read.reader} with {ARGUMENT}=, which a quantized layer does not take"
    return f"its weight is read by {read.reader}, which cannot read codes"


def read_weights(model: Module, linears: Iterable[str], packed_dtype: str) -> dict[str, Read]:
    """Of ``linears``, paths in ``model``, those whose weight other code reads → the first such code.

    ``packed_dtype`` is the torch dtype of the codes: ``uint8`` or ``int8``.
    """
    paths = {id(model.get_submodule(path)): path for path in linears}
    kinds: set[tuple[Any, Any]] = {(type(module), _helper_of(module)) for module in model.modules()}
    at_work = called_names(method_names(type(model)), kinds)
    found: dict[str, Read] = {}
    for module in model.modules():
        kind: Any = type(module)
        for read in reads_of(kind, _helper_of(module)):
            if packed_dtype in read.guarded or read.method not in at_work or (read.reader, read.path) in CLOSED:
                continue
            if not all(condition.may_hold(module) for condition in read.conditions):
                continue
            for inner in _resolved(module, read.path):
                path = paths.get(id(inner))
                if path is not None and inner is not module:
                    found.setdefault(path, read)
    return {path: found[path] for path in paths.values() if path in found}


def _helper_of(module: Module) -> Any:
    """The class of diffusers' attention processor: its ``__call__`` is given the module."""
    processor = getattr(module, "processor", None)
    return type(processor) if processor is not None and not hasattr(processor, "parameters") else None


def _resolved(module: Module, path: Path) -> Iterator[Module]:
    """The modules that a path leads to from ``module``."""
    if not path:
        yield module
        return
    step, rest = path[0], path[1:]
    if step == FIRST:
        owner = _owner_of_first_parameter(module)
        if owner is not None:
            yield owner
        return
    children = module._modules
    if step.startswith("-"):  # from the end of a list
        names = list(children)
        inner = [children[names[int(step)]]] if len(names) >= -int(step) else []
    elif ANY in step:
        pattern = re.compile(".*".join(map(re.escape, step.split(ANY))))
        inner = [child for name, child in children.items() if pattern.fullmatch(name)]
    else:
        inner = [children.get(step)]
    for child in inner:
        if child is not None:
            yield from _resolved(child, rest)


def _owner_of_first_parameter(module: Module) -> Module | None:
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                return inner if name == "weight" else None
    return None
