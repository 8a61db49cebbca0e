"""Experts that were quantized, as parameters of their model: packed, and dequantized when the forward reads them.

bitsandbytes does so with ``nn.parametrize.replace_parameter_4bit_prequantized`` (0.50.2): the experts of one layer at a
time are in memory as the dtype they had, for as long as the layer's forward runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from qz import MalformedInput, Unsupported
from qz.formats.checkpoint.quantization.quantized import QuantizedWeight
from qz.quantize.libraries.expert_layout import expert_lists
from qz.quantize.libraries.transformers.internals import dot_natural_key, model_on_meta
from qz.quantize.libraries.transformers.origins import LoadedNames
from qz.quantize.loading.tensors import Tensors

KERNEL_LIMIT = 1 << 31
"""bitsandbytes' CUDA kernels count values in 32 bits."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One parameter that holds all experts of a layer: the weights that it is made of, in the order of its bytes."""

    shape: tuple[int, ...]
    """Of the parameter in the model."""
    weights: tuple[QuantizedWeight, ...]
    transposed: bool = False
    """The weights are (out, in), the parameter has (in, out) of each expert."""

    @property
    def names(self) -> Iterator[str]:
        """Of all tensors that it is made of."""
        return (part.name for weight in self.weights for part in weight.parts.values())

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.weights[0].dtype or "bfloat16")
        return dtype


def find_stacks(model_class: Any, config: Any, weights: Mapping[str, QuantizedWeight]) -> dict[str, Stack]:
    """The parameters of the model that quantized experts belong to, by name; none for a model without such.

    Raises MalformedInput where experts are missing, Unsupported where the class arranges them in a way not known here.
    """
    lists = expert_lists(weights)
    candidates = [name for name, each in weights.items() if ".experts." in name or len(each.shape or ()) == 3]
    if not candidates:
        return {}
    model = model_on_meta(model_class, config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, Stack] = {}
    for parameter, singles in lists.stacked.items():
        if parameter in shapes:
            found[parameter] = Stack(shapes[parameter], tuple(weights[name] for name in singles), transposed=True)
    listed = {name for each in lists.stacked.values() for name in each}
    names = LoadedNames.of(model, model.state_dict())
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted((name for name in candidates if name not in listed), key=dot_natural_key):
        parameter, pattern = names.after_loading(name)
        if len(shapes.get(parameter, ())) != 3:
            continue
        if len(weights[name].shape or ()) == 3:
            found[parameter] = Stack(shapes[parameter], (weights[name],))
        elif pattern is not None:
            groups.setdefault(parameter, {}).setdefault(pattern, []).append(name)
    patterns = {pattern: entry.source_patterns for entry in names.converters for pattern in entry.source_patterns}
    for parameter, parts in groups.items():
        ordered = [parts.get(pattern, []) for pattern in patterns[next(iter(parts))]]
        if len({len(part) for part in ordered}) != 1:
            counts = " and ".join(str(len(part)) for part in ordered)
            raise MalformedInput(
                f"{parameter}: {counts} quantized weights of one kind each do not make up whole experts. Quantize the "
                "original again."
            )
        made = tuple(weights[name] for row in zip(*ordered, strict=True) for name in row)
        found[parameter] = Stack(shapes[parameter], made)
    for parameter, stack in found.items():
        _require_fit(parameter, stack)
    return found


def _require_fit(parameter: str, stack: Stack) -> None:
    """Raise unless the weights, one after the other, are the parameter."""
    count, *matrix = stack.shape
    whole = len(stack.weights) == 1 and stack.weights[0].shape == stack.shape
    each = len(stack.weights) // count
    shapes = [weight.shape or () for weight in stack.weights]
    if stack.transposed:
        fits = each == 1 and all(list(shape) == matrix[::-1] for shape in shapes)
    else:
        fits = bool(each) and all(
            sum(shape[0] for shape in shapes[start : start + each]) == matrix[0]
            and all(shape[1:] == (matrix[1],) for shape in shapes[start : start + each])
            for start in range(0, len(shapes), each)
        )
    if not whole and (len(stack.weights) != each * count or not fits):
        raise MalformedInput(
            f"{parameter} has the shape {list(stack.shape)}, which {len(stack.weights)} quantized weights, the first "
            f"of {list(shapes[0]) if shapes else []}, do not make up. Quantize the original again."
        )
    kinds = {(weight.kind, weight.blocksize) for weight in stack.weights}
    ragged = any(weight.elements % (weight.blocksize or 1) for weight in stack.weights)
    if len(kinds) != 1 or "int8" in next(iter(kinds)) or (ragged and not whole):
        raise Unsupported(
            f"{parameter}: its experts are quantized in different ways, or not in whole blocks. Quantize them again."
        )


def pack(model: Any, name: str, stack: Stack, tensors: Tensors, device: torch.device) -> None:
    """Put the quantized experts into their place in ``model``."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    count = torch.Size(stack.shape).numel()
    if device.type == "cuda" and count >= KERNEL_LIMIT:
        raise Unsupported(
            f"{name} has {count:,} values, more than bitsandbytes' GPU kernels can count ({KERNEL_LIMIT:,}). Load it "
            "with device='cpu', or with vLLM."
        )
    packed = [tensors.read(weight.name).reshape(-1).view(torch.uint8) for weight in stack.weights]
    states = [tensors.quant_state(weight, device) for weight in stack.weights]
    stored = (stack.shape[0], *stack.shape[:0:-1]) if stack.transposed else stack.shape
    # bitsandbytes' AVX-512 code (0.50.2) misreads rows that are not whole blocks, but reads one long row correctly.
    in_rows = stored[-1] % states[0].blocksize == 0
    state = QuantState(
        absmax=torch.cat([each.absmax for each in states]),
        shape=torch.Size(stored if in_rows else (count,)),
        code=states[0].code,
        blocksize=states[0].blocksize,
        quant_type=states[0].quant_type,
        dtype=states[0].dtype,
    )
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    codes = torch.cat(packed).reshape(-1, 1).to(device)
    setattr(module, leaf, torch.nn.Parameter(codes, requires_grad=False))
    replace_parameter_4bit_prequantized(module, leaf, state.as_dict(packed=True), device)
    if stack.transposed or not in_rows:
        parametrize.register_parametrization(module, leaf, _InShape(stored, turn=stack.transposed), unsafe=True)
    if not hasattr(module, "qz_dtype"):
        module.qz_dtype = states[0].dtype
        module.register_forward_pre_hook(_to_experts_dtype)
        module.register_forward_hook(_back)


class _InShape(torch.nn.Module):
    """Dequantized experts in the shape of the model's parameter."""

    def __init__(self, shape: Sequence[int], *, turn: bool) -> None:
        super().__init__()
        self.shape, self.turn = tuple(shape), turn

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = values.reshape(self.shape)
        return values.transpose(-1, -2) if self.turn else values


def _to_experts_dtype(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hidden states in the experts' dtype: training in mixed precision gives them in float32."""
    first = inputs[0] if inputs else None
    if not isinstance(first, torch.Tensor) or first.dtype == module.qz_dtype:
        module.qz_back = None
        return None
    module.qz_back = first.dtype
    return (first.to(module.qz_dtype), *inputs[1:])


def _back(module: Any, _: tuple[Any, ...], output: Any) -> Any:
    return output.to(module.qz_back) if module.qz_back is not None and isinstance(output, torch.Tensor) else output
