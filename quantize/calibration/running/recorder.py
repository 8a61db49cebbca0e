"""Sums over the inputs of a model's linears while it runs: of squares, or of outer products."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qz import Unsupported
from qz.quantize.calibration.running.blocks import Finished
from qz.quantize.calibration.running.experts import expert_key, watched
from qz.quantize.importance.statistics import MAX_HESSIAN_INPUTS, Floats, InputSums
from qz.quantize.libraries.transformers.runnable import ExpertLayer


class Recorder:
    """Hooks on ``linears``, by path. A forward ends at ``head``, whose output is not needed.

    With ``hessians``, linears that are called with the same tensor share one sum, under the name of the first.
    ``experts``, by the paths of their layers, are recorded by what ``expert_key`` gives, and have no Hessians.
    """

    def __init__(
        self, linears: Mapping[str, Any], head: Any, *, hessians: bool, experts: Mapping[str, ExpertLayer] | None = None
    ) -> None:
        self.hessians, self.head = hessians, head
        self.sums = {f"{path}.weight": np.zeros(_inputs(module), np.float64) for path, module in linears.items()}
        self.names: dict[str, tuple[str, ...]] = {}
        """Of an expert's weights, which are multiplied with the same inputs."""
        self._watching = ExitStack()
        if experts:
            self._watching.enter_context(watched(experts, self._add_inputs))
            for path, layer in experts.items():
                for parameter, of_each in layer.weights.items():
                    keys = [expert_key(path, parameter, number) for number in range(len(of_each))]
                    self.names |= zip(keys, of_each, strict=True)
                    self.sums |= {key: np.zeros(layer.inputs(parameter), np.float64) for key in keys}
        self.tokens = dict.fromkeys(self.sums, 0)
        self.products: dict[str, torch.Tensor] = {}
        """Of the part that is running, by the first weight's name, float32[in, in]."""
        self.first: dict[str, str] = {}
        """Weight → the one whose sum it shares."""
        self.written: set[str] = set()
        self.last = threading.local()
        self.handles = [
            module.register_forward_pre_hook(self._hook(f"{path}.weight", module), with_kwargs=True)
            for path, module in linears.items()
        ]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self._watching.close()

    def take_hessians(self) -> dict[str, Floats]:
        """What has been summed since the last time; the diagonals become the sums of squares."""
        taken = {name: product.cpu().numpy() for name, product in self.products.items()}
        self.products.clear()
        self.written |= taken.keys()
        for name, first in self.first.items():
            if first in taken:
                self.sums[name] = taken[first].diagonal().astype(np.float64)
        return taken

    def restore(
        self, values: Mapping[str, NDArray[np.float64]], tokens: Mapping[str, int], first: Mapping[str, str]
    ) -> None:
        """Take over what an earlier run recorded of weights whose blocks it finished."""
        for name, each in values.items():
            self.sums[name], self.tokens[name] = each, tokens[name]
            if name in first:
                self.first[name] = first[name]
                self.written.add(first[name])

    def input_sums(self) -> dict[str, InputSums]:
        return {
            name: InputSums(values.astype(np.float32), self.tokens[key])
            for key, values in self.sums.items()
            for name in self.names.get(key, (key,))
        }

    def add(self, name: str, squares: NDArray[np.float64], tokens: int) -> None:
        """Count the inputs of one call of the weight ``name``."""
        self.sums[name] += squares
        self.tokens[name] += tokens

    def _hook(self, name: str, module: Any) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            x = given.flatten(0, -2).float()
            if self.hessians and x.shape[1] <= MAX_HESSIAN_INPUTS:
                self.tokens[name] += len(x)
                self._multiply(name, given, x)
            else:
                self._add_inputs(name, x)
            if module is self.head:
                raise Finished

        return hook

    def _add_inputs(self, name: str, inputs: torch.Tensor) -> None:
        x = inputs.flatten(0, -2).float()
        self.add(name, x.square().sum(0).cpu().double().numpy(), len(x))

    def _multiply(self, name: str, given: torch.Tensor, x: torch.Tensor) -> None:
        if getattr(self.last, "given", None) is not given:
            self.last.given, self.last.name = given, name
        first = self.last.name
        if self.first.setdefault(name, first) != first or first in self.written:
            raise Unsupported(
                f"{name} is used in more than one place of the model: its Hessian cannot be summed block by block. "
                "Calibrate without --hessians."
            )
        if first == name:
            product = self.products.setdefault(name, torch.zeros((x.shape[1],) * 2, device=x.device))
            product.addmm_(x.T, x)


def _inputs(module: Any) -> int:
    """A ``Conv1D`` holds (in, out), a ``Linear`` (out, in)."""
    return int(module.weight.shape[1 if isinstance(module, torch.nn.Linear) else 0])
