"""Which linear layers transformers quantizes, which stay as they are, why, and the skip list that tells a loader."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from qz import Unsupported, UsageError
from qz.formats.malformed import quoted
from qz.formats.patterns import INVALID
from qz.quantize.libraries.architecture import LoadRequest, Skips, skip_list
from qz.quantize.libraries.exemptions import exempt
from qz.quantize.libraries.skip_names import spelled_out
from qz.quantize.libraries.source_code.weight_readers import read_by_others
from qz.quantize.libraries.transformers.experts import GATE, find_experts, routers
from qz.quantize.libraries.transformers.internals import (
    MODULES_TO_PATCH_FOR_QUANTIZATION,
    Conv1D,
    default_skips,
    float32_modules,
    should_convert_module,
    tied_weights,
)
from qz.quantize.libraries.transformers.origins import Model


@dataclass(frozen=True, slots=True)
class Selection:
    """What happens to the linear layers of a model."""

    linears: Mapping[str, bool] = field(default_factory=dict)
    """Paths of those to quantize → whether they are stored transposed."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Paths of those to keep → why."""
    skips: list[str] | None = None
    """``llm_int8_skip_modules``; None where the library's own defaults are meant."""
    notes: tuple[str, ...] = ()


def select(model: Model, request: LoadRequest) -> Selection:
    """Choose as ``from_pretrained(quantization_config=…)`` does, but for layers whose weight other code reads."""
    if request.method is None:
        return Selection()
    _refuse_patched(model)
    tied = {name.removesuffix(".weight") for pair in tied_weights(model).items() for name in pair}
    if not request.default_skips and tied:
        raise UsageError(
            f"--no-default-skips would quantize the tied weights {', '.join(sorted(tied))}, and the result could not "
            "run. Leave it out, or untie the weights first."
        )
    _require_patterns(request.skips)
    defaults = default_skips(model)
    float32 = float32_modules(model)
    experts = find_experts(model, request.skips) if request.experts else None
    gates = [GATE] if experts is not None else []
    patterns = list(dict.fromkeys([*(defaults if request.default_skips else ()), *float32, *gates, *request.skips]))
    linears: dict[str, bool] = {}
    kept: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (Conv1D, torch.nn.Linear)):
            continue
        if type(module) is not torch.nn.Linear and not isinstance(module, Conv1D):
            kept[path] = f"a {type(module).__name__}, which transformers does not quantize"
        elif should_convert_module(path, patterns):
            linears[path] = isinstance(module, Conv1D)
        elif _matches(request.skips, path):
            kept[path] = "skipped on request"
        elif _matches(float32, path):
            kept[path] = "kept in float32 by the model"
        elif _matches(gates, path):
            kept[path] = "a gate, which vLLM cannot load quantized"
        else:
            kept[path] = "tied to another weight" if path in tied else "output layer"
    reasons = read_by_others(model, linears, request.method)
    exempted = exempt(reasons, linears, _matches, wanted=request.default_skips)
    linears = {path: transposed for path, transposed in linears.items() if path not in exempted.kept}
    skips = skip_list(Skips(tuple(sorted(defaults)), exempted.keys), request)
    kept |= exempted.kept
    if skips is not None:  # a list of its own: it is to mean the same to those that take no patterns
        skips += [gate for gate in gates if any(_matches([gate], path) for path in kept)]
        others = [*kept, *(routers(model, experts.layers) if experts is not None else ())]
        skips += [path for path in spelled_out(others, skips) if not any(_matches([path], each) for each in linears)]
    return Selection(linears, kept, skips, exempted.notes)


def _matches(keys: Iterable[str], path: str) -> bool:
    return not should_convert_module(path, list(keys))


def _refuse_patched(model: Model) -> None:
    patched = {type(module).__name__ for module in model.modules()} & set(MODULES_TO_PATCH_FOR_QUANTIZATION)
    if patched:
        raise Unsupported(
            f"transformers replaces {', '.join(sorted(patched))} when it quantizes, and cannot load back what it then "
            f"saves ({type(model).__name__}). Use a quantization made for this family, such as compressed-tensors."
        )


def _require_patterns(skips: Iterable[str]) -> None:
    for pattern in skips:
        try:
            re.compile(pattern)
        except INVALID as error:
            raise UsageError(f"--skip {quoted(pattern)} is not a regular expression: {error}.") from error
