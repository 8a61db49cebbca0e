"""What models and blocks of diffusers return, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qz import Unsupported


def states_of(output: Any) -> torch.Tensor:
    """All states that a model or block of diffusers returns, [tokens, features]: of pictures, texts or both.

    Channels of pictures and videos, the second of four dimensions and more, are features.
    """
    values = (output,) if torch.is_tensor(output) else output.values() if hasattr(output, "values") else output
    tensors = [each for each in _flat(values) if each.is_floating_point() and each.ndim > 1]
    if not tensors:
        raise Unsupported(f"a block returns no hidden states, but {type(output).__name__}")
    states = [(each.movedim(1, -1) if each.ndim > 3 else each).flatten(0, -2) for each in tensors]
    return torch.cat([each for each in states if each.shape[-1] == states[0].shape[-1]])


def _flat(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for each in values if isinstance(values, Sequence) or hasattr(values, "__iter__") else ():
        if torch.is_tensor(each):
            found.append(each)
        elif type(each) in (list, tuple):
            found += _flat(each)
    return found
