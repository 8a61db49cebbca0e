"""Devices that torch has no errors and figures for run out of memory like the others; torch's CPU device stands in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from qz import TryAgain
from qz.quantize.compute.cpu.cpu_arithmetic import Cpu
from qz.quantize.compute.gpu.gpu_arithmetic import CHUNK_BYTES, LEAST_BYTES, Accelerator
from qz.quantize.compute.gpu.lanes import Lane

NO_CLASS = RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB, max allowed: 9.1 GB).")
"""What MPS raises: no OutOfMemoryError."""


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator([torch.device("cpu")], "mps", chunk_bytes=CHUNK_BYTES)


def limit(monkeypatch: pytest.MonkeyPatch, nbytes: int, error: RuntimeError) -> list[int]:
    """Let a device raise for inputs of more than ``nbytes``; the sizes that it was given."""
    whole, seen = Lane.run, []

    def run(lane: Lane, inputs: Sequence[torch.Tensor], compute: Callable[..., Any], outs: Any) -> bool:
        seen.append(max(each.nbytes for each in inputs))
        if seen[-1] > nbytes:
            raise error
        return whole(lane, inputs, compute, outs)

    monkeypatch.setattr(Lane, "run", run)
    return seen


@pytest.mark.parametrize("error", [NO_CLASS, torch.OutOfMemoryError("out of memory")])
def test_smaller_pieces_are_tried_when_memory_is_short(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    values = np.random.default_rng(0).standard_normal(3 << 20).astype(np.float32)
    packed, absmax = np.empty(len(values) // 2, np.uint8), np.empty(len(values) // 64, np.float32)
    expected, scales = packed.copy(), absmax.copy()
    seen = limit(monkeypatch, 4 << 20, error)
    accelerator.quantize_4bit(values, "F32", "nf4", packed, absmax)
    assert max(seen) > 4 << 20, "the device never ran out of memory"
    Cpu().quantize_4bit(values, "F32", "nf4", expected, scales)
    assert np.array_equal(packed, expected)
    assert np.array_equal(absmax, scales)


@pytest.mark.parametrize("error", [NO_CLASS, torch.OutOfMemoryError("out of memory")])
def test_too_little_memory_is_worth_trying_again(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    seen = limit(monkeypatch, 0, error)
    values, absmax = np.ones(4 << 20, np.float32), np.empty(64 << 10, np.float32)
    with pytest.raises(TryAgain, match=r"mps .* has no memory left .*Free GPU memory"):
        accelerator.quantize_4bit(values, "F32", "nf4", np.empty(2 << 20, np.uint8), absmax)
    assert min(seen) < 2 * LEAST_BYTES
    with pytest.raises(TryAgain, match="has no memory left"):
        accelerator.quantize_absmax(absmax)


def test_any_other_error_is_told_as_it_is(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 0, RuntimeError("wrong shape"))
    with pytest.raises(RuntimeError, match="wrong shape"):
        accelerator.quantize_absmax(np.ones(64, np.float32))
