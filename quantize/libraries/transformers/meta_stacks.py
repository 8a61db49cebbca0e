"""Experts stacked on the meta device at once: torch looks at each of hundreds of tensors in Python, several times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def meta_stacks() -> Iterator[None]:
    """Inside, ``torch.stack`` of plain tensors on meta that have one shape and dtype looks at no more than that."""
    stack = torch.stack

    def stacked(tensors: Any, *args: Any, **more: Any) -> torch.Tensor:
        alike = _at_once(tensors, *args, **more)
        return stack(tensors, *args, **more) if alike is None else alike

    torch.stack = stacked
    try:
        yield
    finally:
        torch.stack = stack


def _at_once(tensors: Any, dim: int = 0, **more: Any) -> torch.Tensor | None:
    """None for tensors that are not alike."""
    first = tensors[0] if tensors else None
    if first is None or more or not all(_is_alike(each, first) for each in tensors):
        return None
    shape = list(first.shape)
    shape.insert(dim if dim >= 0 else dim + first.ndim + 1, len(tensors))
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return type(one) is torch.Tensor and one.is_meta and one.dtype == other.dtype and one.shape == other.shape
