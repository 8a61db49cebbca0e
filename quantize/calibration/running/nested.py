"""Tensors in what models and blocks are given and return: in lists, tuples, mappings and the libraries' outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``change`` of each tensor in it; what is of no kind that is looked into stays."""
    if torch.is_tensor(value):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(changed(each, change) for each in value)
    if is_library_output(value):
        return type(value)(**{name: changed(each, change) for name, each in value.items()})
    if isinstance(value, dict):
        return {name: changed(each, change) for name, each in value.items()}
    return value


def is_library_output(value: Any) -> bool:
    """Whether it is one of the mappings that models of the libraries return, by the names of their fields."""
    return isinstance(value, OrderedDict) and is_of_a_library(type(value).__module__)


def is_of_a_library(module: str) -> bool:
    """Whether a module, by its dotted name, belongs to transformers or diffusers."""
    return module.partition(".")[0] in ("transformers", "diffusers")
