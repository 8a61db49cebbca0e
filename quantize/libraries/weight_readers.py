"""Linear layers whose weight is read by other code than their own, found in the source of a model's classes.

A quantized layer holds packed codes where a weight was. Code that calls the layer gets its result as before; code that
reads ``self.proj.weight`` gets the codes: it fails, or goes on with nonsense. Neither library knows of it.

Not counted: the device of a weight, a dtype that the code compares with that of packed weights, branches that the
module's own attributes close (training is one), methods that build, tie, load or convert a model, and those that
nothing calls.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qz.quantize.libraries.architecture import LoadRequest, torch_name
from qz.quantize.libraries.module_source import ANY, FIRST, Path, called_names, method_names, reads_of

Module = Any
"""A ``torch.nn.Module``."""
Matches = Callable[[Iterable[str], str], bool]
"""A library's rule for its skip list: whether one of the keys means the module of a path."""

CLOSED = frozenset((("DisentangledSelfAttention", ("in_proj",)),))
"""Reads, by class and path, in branches that are closed, though not by an attribute of the class itself: DeBERTa splits
``in_proj`` for queries of their own, which only ``z_steps`` above 1 give, and ``DebertaModel`` sets it to 0."""


@dataclass(frozen=True, slots=True)
class ReadByOthers:
    """Layers that stay as they are because other code reads their weight: path → why, and keys that match just them."""

    kept: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_by_others(model: Module, linears: Iterable[str], request: LoadRequest, matches: Matches) -> ReadByOthers:
    """Of the layers that would be quantized, those that must not be. ``matches`` is the library's rule for skip keys.

    Without the default skips none is kept, as the library does, and a note says what that means.
    """
    assert request.method is not None
    linears = list(linears)
    readers = read_weights(model, linears, torch_name(request.method.parts((1, 1), "float32")[0].dtype, "codes"))
    if not readers:
        return ReadByOthers()
    keys = _keys(list(readers), linears, matches)
    kept = {path: _reason(path, readers) for path in linears if path in readers or matches(keys, path)}
    counts = Counter(readers.values())
    who = ", ".join(f"{reader} ({count})" if len(counts) > 1 else reader for reader, count in counts.items())
    what = f"{next(iter(readers))} is" if len(readers) == 1 else f"{len(readers)} linear layers ({_listed(keys)}) are"
    if not request.default_skips:
        return ReadByOthers(
            notes=(f"{what} quantized, but {who} reads their weights: the output may fail or be wrong",)
        )
    return ReadByOthers(kept, keys, (f"{what} not quantized: {who} reads the weights, which only works unquantized",))


def _reason(path: str, readers: Mapping[str, str]) -> str:
    if path in readers:
        return f"its weight is read by {readers[path]}"
    return "has the name of a layer whose weight is read by other code"


def _listed(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _keys(paths: list[str], linears: list[str], matches: Matches) -> tuple[str, ...]:
    """Keys for the skip list that match ``paths``, as short as can be, and no other of ``linears`` if there are such.

    transformers takes a key for a regular expression; diffusers has none that names a layer of the model's root alone.
    """
    wanted = set(paths)
    others = [path for path in linears if path not in wanted]
    keys: list[str] = []
    for path in paths:
        if matches(keys, path):
            continue
        steps = path.split(".")
        endings = [".".join(steps[-count:]) for count in range(1, len(steps) + 1)]
        forms = [form for form in (*endings, f"{re.escape(path)}$") if matches([form], path)]
        own = (form for form in forms if not any(matches([form], other) for other in others))
        keys.append(next(own, path))
    return tuple(keys)


def read_weights(model: Module, linears: Iterable[str], packed_dtype: str) -> dict[str, str]:
    """Of ``linears``, paths in ``model``, those whose weight other code reads → the class of that code.

    ``packed_dtype`` is the torch dtype of the codes: ``uint8`` or ``int8``.
    """
    paths = {id(model.get_submodule(path)): path for path in linears}
    kinds: set[tuple[Any, Any]] = {(type(module), _helper_of(module)) for module in model.modules()}
    at_work = called_names(method_names(type(model)), kinds)
    found: dict[str, str] = {}
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
                    found.setdefault(path, read.reader)
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
