"""Which linear layers diffusers quantizes, which stay as they are, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qz.quantize.libraries.architecture import LoadRequest, Skips
from qz.quantize.libraries.exemptions import exempt
from qz.quantize.libraries.source_code.weight_readers import read_by_others
from qz.quantize.methods import Method


@dataclass(frozen=True, slots=True)
class Selection:
    """Linear layers to quantize; those to keep → why; keys for the skip list that say so; what to tell the user."""

    linears: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)
    notes: tuple[str, ...] = ()


def select(model: Any, request: LoadRequest, fp32: list[str]) -> Selection:
    """Choose as ``from_pretrained(quantization_config=…)`` does, which skips nothing but ``fp32`` of its own accord;
    and leave out what would not work, or not load."""
    if request.method is None:
        return Selection()
    linears: list[str] = []
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if matches(request.skips, path):
            kept[path] = "skipped on request"
        elif matches(fp32, path):
            kept[path] = "kept in float32 by the model"
        else:
            linears.append(path)
    reasons = read_by_others(model, linears, request.method)
    reasons |= {path: _CANNOT_LOAD for path in linears if not _loads_back(path, request.method)}
    exempted = exempt(reasons, linears, matches, wanted=request.default_skips)
    chosen = tuple(path for path in linears if path not in exempted.kept)
    return Selection(chosen, kept | dict(exempted.kept), Skips((), exempted.keys), exempted.notes)


_CANNOT_LOAD = "diffusers could not load it back, for its name"


def _loads_back(path: str, method: Method) -> bool:
    """Whether the library finds its way from the name of a quantized weight to what belongs to it.

    ``quantizers/bitsandbytes/bnb_quantizer.py`` (0.42.1) takes every 4-bit name with "bias" in it for a bias, and for
    the scales of an int8 weight puts "SCB" in the place of every "weight" in its name.
    """
    return "weight" not in path if method.bits == 8 else "bias" not in path


def matches(keys: Iterable[str], path: str) -> bool:
    """The library's rule: a key matches a leaf's name, a whole path, or ``key.`` anywhere in the path."""
    leaf = path.rpartition(".")[2]
    return any(key in (leaf, path) or f"{key}." in path for key in keys)
