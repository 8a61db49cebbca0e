"""The inputs of single experts, whose weights are slices of one parameter of their layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qz import Unsupported
from qz.quantize.libraries.transformers.runnable import ExpertLayer

_PRODUCTS = {"linear", "matmul", "__matmul__"}
OnInputs = Callable[[str, torch.Tensor], None]
"""Called with what ``expert_key`` gives and the inputs [tokens, in] of that expert."""


def expert_key(path: str, parameter: str, expert: int) -> str:
    """What the inputs of one expert's part of a parameter are recorded as."""
    return f"{path}.{parameter}.{expert}"


@contextmanager
def watched(layers: Mapping[str, ExpertLayer], on_inputs: OnInputs) -> Iterator[None]:
    """While ``layers``, by path, run, tell what each expert is multiplied with.

    They must compute one expert after the other, as the libraries' "eager" implementation does: Unsupported is raised
    where no product with an expert is seen.
    """
    for path, layer in layers.items():
        layer.module.forward = _Watched(path, layer, on_inputs)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.module.forward


class _Watched:
    """A layer's forward."""

    def __init__(self, path: str, layer: ExpertLayer, on_inputs: OnInputs) -> None:
        self.path, self.layer, self.forward, self.on_inputs = path, layer, layer.module.forward, on_inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unseen = set(self.layer.weights)

        def tell(leaf: str, expert: int, inputs: torch.Tensor) -> None:
            unseen.discard(leaf)
            self.on_inputs(expert_key(self.path, leaf, expert), inputs)

        with _Products({leaf: self.layer.module.get_parameter(leaf) for leaf in unseen}, tell):
            answer = self.forward(*args, **kwargs)
        if unseen:
            raise Unsupported(
                f"{self.path} computes its experts in a way that does not show what comes to {min(unseen)}. Leave "
                "out --experts."
            )
        return answer


class _Products(TorchFunctionMode):
    """Finds the parameter, and the expert in it, that a product's second factor is a slice of."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], tell: Callable[[str, int, torch.Tensor], None]) -> None:
        super().__init__()
        self.parameters, self.tell = parameters, tell

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _PRODUCTS and len(args) > 1:
            self._look(*args[:2])
        return function(*args, **(kwargs or {}))

    def _look(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        for name, parameter in self.parameters.items():
            behind = weight.data_ptr() - parameter.data_ptr()
            if 0 <= behind < parameter.nbytes:
                self.tell(name, behind // (parameter.nbytes // len(parameter)), inputs)
