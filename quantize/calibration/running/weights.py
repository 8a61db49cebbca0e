"""The weights of parts of a model, read from its checkpoint when they are needed, and given up afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qz import MalformedInput
from qz.formats.checkpoint.survey import Checkpoint
from qz.formats.malformed import quoted
from qz.quantize.libraries.architecture import Weight
from qz.quantize.libraries.importing.isolation import trusted
from qz.quantize.libraries.transformers.runnable import Runnable
from qz.quantize.planning.sources import Source
from qz.quantize.streaming.readers import assemble


class Weights:
    """Reads tensors of ``checkpoint`` into ``runnable``'s modules, in its dtype and on its device."""

    def __init__(self, checkpoint: Checkpoint, runnable: Runnable, sources: Mapping[str, Source] | None = None) -> None:
        self.checkpoint, self.runnable = checkpoint, runnable
        self.sources: Mapping[str, Source] = checkpoint.tensors if sources is None else sources
        self.bytes_read = 0

    def load(self, path: str, module: Any) -> None:
        """Give every parameter and stored buffer of the module at ``path`` its value."""
        for name, owner, attribute in _tensors(path, module):
            self._load(name, owner, attribute)

    def load_rest(self, parts: dict[str, Any], without: Any = None) -> None:
        """Load what belongs to no part, and not to the module ``without``, for good."""
        left = {id(module) for part in parts.values() for module in part.modules()} | {id(without)}
        for path, module in self.runnable.model.named_modules():
            if id(module) not in left:
                for name, owner, attribute in _tensors(path, module, deep=False):
                    self._load(name, owner, attribute)

    def release(self, path: str, module: Any) -> None:
        """Give the memory of the module's parameters back."""
        for _, owner, attribute in _tensors(path, module):
            parameter = owner._parameters.get(attribute)
            if parameter is not None:
                owner._parameters[attribute] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _load(self, name: str, owner: Any, attribute: str) -> None:
        runnable, buffer = self.runnable, attribute in owner._buffers
        origin = runnable.origins.get(name)
        if origin is None:
            if buffer:
                return  # computed when the model was built
            raise MalformedInput(
                f"{self.checkpoint.folder.location} has no weight for {quoted(name)}. Download it again."
            )
        there = owner._buffers[attribute] if buffer else owner._parameters[attribute]
        dtype = runnable.dtype_of(name) if there.is_floating_point() and not buffer else there.dtype
        shape = tuple(there.shape)
        weight = Weight(
            name,
            origin.sources,
            str(dtype).removeprefix("torch."),
            shape,
            transposed=name in runnable.transposed,
            conversion=origin.conversion,
        )
        with trusted():
            raw = assemble(self.checkpoint.folder, weight, [self.sources[each] for each in origin.sources])
        value = torch.from_numpy(raw).view(dtype).reshape(shape).to(runnable.device)
        self.bytes_read += sum(self.sources[each].nbytes for each in origin.sources)
        if buffer:
            owner._buffers[attribute] = value
        else:
            owner._parameters[attribute] = torch.nn.Parameter(value, requires_grad=False)


def _tensors(path: str, module: Any, *, deep: bool = True) -> list[tuple[str, Any, str]]:
    """(name in the model, module, attribute) of the parameters and buffers of a module, and of those inside it."""
    found = []
    for inner, owner in module.named_modules() if deep else (("", module),):
        prefix = ".".join(part for part in (path, inner) if part)
        kinds = (owner._parameters, owner._buffers)
        there = [attribute for kind in kinds for attribute, value in kind.items() if value is not None]
        found += [(f"{prefix}.{attribute}" if prefix else attribute, owner, attribute) for attribute in there]
    return found
