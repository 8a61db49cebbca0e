"""Every way in which code gets at the weight of a layer of another class is found in its source, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qz.quantize.libraries.source_code.weight_readers import read_weights


def project(x: torch.Tensor, layer: Any) -> torch.Tensor:
    return functional.linear(x, layer.weight)


class Base(nn.Module):
    """A list, a dict and single layers, none of whose weights is read."""

    option = False

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="x", slow=False)
        self.slow = False
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x: Any) -> Any:
        return self.inner(self.two(self.one(x)))


class Directly(Base):
    def forward(self, x: Any) -> Any:
        return x @ self.one.weight


class ByAName(Base):
    def forward(self, x: Any) -> Any:
        layer = self.one if x is None else self.two
        return x @ layer.weight.t()


class ByTheNameOfItsArgument(Base):
    def forward(self, x: Any) -> Any:
        return self.two(self.one(input=x))


class InAFunction(Base):
    def forward(self, x: Any) -> Any:
        return project(x, self.one)


class InAMethodOfTheClass(Base):
    def forward(self, x: Any) -> Any:
        return self.apply_layer(x, layer=self.two)

    def apply_layer(self, x: Any, layer: Any) -> Any:
        return functional.linear(x, layer.weight, layer.bias)


class InALoop(Base):
    def forward(self, x: Any) -> Any:
        for number, layer in enumerate(self.layers):
            x = x @ layer.weight * number
        return x


class ByPlace(Base):
    def forward(self, x: Any) -> Any:
        return x.to(self.layers[0].weight.dtype) @ self.layers[-1].weight


class AfterAnIndex(Base):
    def forward(self, x: Any) -> Any:
        x[self.slow :] = 0
        return x @ self.one.weight


class ByGetattr(Base):
    def forward(self, x: Any) -> Any:
        return x @ getattr(self, "one").weight + getattr(self, f"t{x}o").weight  # noqa: B009


class ByProperty(Base):
    @property
    def dtype(self) -> Any:
        return self.one.weight.dtype

    def forward(self, x: Any) -> Any:
        return x.to(self.dtype)


class FirstParameter(Base):
    def forward(self, x: Any) -> Any:
        return x.to(next(iter(self.inner.parameters())).dtype)


class ComparedByName(Base):
    def forward(self, x: Any) -> Any:
        if self.one.weight.dtype != torch.int8 and x.dtype != self.one.weight.dtype:
            x = x.to(self.one.weight.dtype)
        return self.one(x)


class WithItsScales(Base):
    def forward(self, x: Any) -> Any:
        if hasattr(self.one.weight, "SCB"):
            self.one.weight.SCB.div_(2)
        else:
            self.one.weight.div_(2)
        return self.one(x)


class OfAnotherModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.child = InALoop()

    def forward(self, x: Any) -> Any:
        return x @ self.child.named["a"].weight


class OnlyInTraining(Base):
    def forward(self, x: Any) -> Any:
        if self.training and x is not None:
            return x @ self.one.weight
        return self.one(x)


class OnlyWithAnOption(Base):
    def forward(self, x: Any) -> Any:
        if self.slow or self.config.slow:
            return x @ self.one.weight
        return x.to(self.one.weight.device)


class NeverCalled(Base):
    def old_dtype(self) -> Any:
        return self.one.weight.dtype

    def _init_weights(self) -> None:
        self.one.weight.data.zero_()


class Whole(nn.Module):
    """A model with one of the others inside: what is public in a model counts as called."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model = inner

    def forward(self, x: Any) -> Any:
        return self.model(x)


FOUND = {
    Base: [],
    Directly: ["one"],
    ByAName: ["one", "two"],
    InAFunction: ["one"],
    InAMethodOfTheClass: ["two"],
    InALoop: ["layers.0", "layers.1", "layers.2"],
    ByTheNameOfItsArgument: ["one"],
    ByPlace: ["layers.0", "layers.2"],
    AfterAnIndex: ["one"],
    ByGetattr: ["one", "two"],
    ByProperty: ["one"],
    FirstParameter: ["inner.0"],
    ComparedByName: ["one"],
    WithItsScales: ["one"],
    OfAnotherModule: ["child.layers.0", "child.layers.1", "child.layers.2", "child.named.a"],
    OnlyInTraining: [],
    OnlyWithAnOption: [],
    NeverCalled: [],
}


def read(kind: type[Base], dtype: str) -> list[str]:
    model = Whole(kind())
    linears = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    return sorted(path.removeprefix("model.") for path in read_weights(model, linears, dtype))


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_reads_are_found_in_the_source(kind: type[Base]) -> None:
    assert read(kind, "uint8") == FOUND[kind]


@pytest.mark.parametrize("kind", [ComparedByName, WithItsScales])
def test_code_that_asks_for_a_packed_dtype_is_taken_at_its_word(kind: type[Base]) -> None:
    assert read(kind, "int8") == []


def test_an_option_that_is_set_opens_its_branch() -> None:
    model = Whole(OnlyWithAnOption())
    model.model.slow = True
    found = read_weights(model, ["model.one"], "uint8")
    assert {path: read.reader for path, read in found.items()} == {"model.one": "OnlyWithAnOption"}
