"""The inputs of single experts, whose weights are slices of one parameter of their layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qz.quantize.libraries.transformers.runnable import ExpertWeights

_PRODUCTS = {"linear", "matmul", "__matmul__"}
OnInputs = Callable[[str, torch.Tensor], None]
"""Called with what ``expert_key`` gives and the inputs [tokens, in] of that expert."""


def expert_key(parameter: str, expert: int) -> str:
    return f"{parameter}.{expert}"


@contextmanager
def watched(layers: dict[str, Any], experts: ExpertWeights, on_inputs: OnInputs) -> Iterator[None]:
    """While ``layers`` (path → module) run, tell what each expert is multiplied with.

    Their forwards must compute one expert after the other, as the libraries' "eager" implementation does.
    """
    for path, layer in layers.items():
        layer.forward = _Watched(layer, [name for name in experts if name.rpartition(".")[0] == path], on_inputs)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


class _Watched:
    """A layer's forward."""

    def __init__(self, layer: Any, parameters: list[str], on_inputs: OnInputs) -> None:
        self.layer, self.forward, self.parameters, self.on_inputs = layer, layer.forward, parameters, on_inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = {name: getattr(self.layer, name.rpartition(".")[2]) for name in self.parameters}
        with _Products(held, self.on_inputs):
            return self.forward(*args, **kwargs)


class _Products(TorchFunctionMode):
    """Finds the parameter, and the expert in it, that a product's second factor is a slice of."""

    def __init__(self, parameters: dict[str, torch.Tensor], on_inputs: OnInputs) -> None:
        super().__init__()
        self.parameters, self.on_inputs = parameters, on_inputs

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _PRODUCTS and len(args) > 1:
            self._look(*args[:2])
        return function(*args, **(kwargs or {}))

    def _look(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        for name, parameter in self.parameters.items():
            behind = weight.data_ptr() - parameter.data_ptr()
            if 0 <= behind < parameter.nbytes:
                self.on_inputs(expert_key(name, behind // (parameter.nbytes // len(parameter))), inputs)
