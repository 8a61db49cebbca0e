"""4-bit layers that bitsandbytes' CPU kernels reject or compute wrongly, mended so that a model runs correctly."""

from __future__ import annotations

import copy
from typing import Any

import torch

PACKED_ROWS = 32
"""``_convert_weight_packed_for_cpu`` (bitsandbytes 0.50.2) fails for other than multiples of these."""


def fit_for_cpu(model: Any) -> Any:
    """The model, on a CPU, with such 4-bit layers mended.

    A layer whose inputs are no whole number of blocks becomes an ordinary one with the same values: with AVX-512 the
    kernels take the scales of the wrong blocks there. One whose outputs are no multiple of 32 stays unpacked.
    """
    from bitsandbytes.nn import Linear4bit

    for path, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit) or module.weight.quant_state is None:
            continue
        state = module.weight.quant_state
        if state.shape[-1] % state.blocksize:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _ordinary(module))
        elif state.shape[0] % PACKED_ROWS:
            module.support_avx512bf16_for_cpu = False
    return model


def _ordinary(module: Any) -> torch.nn.Linear:
    """An ordinary linear layer with the values of a 4-bit one, which are right where all of them are one row."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(module.weight.quant_state)
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    weight = dequantize_4bit(module.weight.data.view(torch.uint8), state).reshape(shape)
    layer = torch.nn.Linear(shape[1], shape[0], bias=module.bias is not None, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        layer.bias = torch.nn.Parameter(module.bias.data.to(weight.dtype), requires_grad=False)
    return layer
