"""Every pair of a value and an absmax: the CPU's kernels against bitsandbytes' operations on this GPU."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from qz.quantize.compute import cuda_tables, kernels, tables

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def known(method: str, dtype: str) -> None:
    import bitsandbytes  # noqa: F401  its operations are there once it is imported, which eight threads cannot do at once

    if not cuda_tables.is_known(method, dtype, CAPABILITY):
        pytest.skip(f"the reciprocals of a GPU of compute capability {CAPABILITY} were not measured")


def magnitudes_within(tops: Iterable[int], grid: Any) -> Any:
    """For each absmax a row of it and all of ``grid`` that is not larger; zeros stand for the rest."""
    rows = [np.append(np.uint16(top), np.where((grid & 0x7FFF) <= top, grid, 0)) for top in tops]
    return np.stack(rows).astype(np.uint16)


def on_gpu(bits: Any, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).cuda().view(TORCH[dtype])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_four_bit_code_and_absmax_is_the_gpus(dtype: str, quant_type: Any) -> None:
    known(quant_type, dtype)
    limit = tables.infinity_bits(dtype)
    every = np.arange(limit, dtype=np.uint16)
    grid = np.resize(np.concatenate([every, every | 0x8000]), -(-2 * limit // 63) * 63).reshape(-1, 63)

    def differences(tops: range) -> int:
        within = [np.where((grid & 0x7FFF) <= top, grid, 0) for top in tops]
        blocks = np.concatenate([np.insert(values, 0, top, axis=1) for top, values in zip(tops, within, strict=True)])
        blocks = blocks.reshape(-1)
        packed, absmax = np.empty(blocks.size // 2, np.uint8), np.empty(blocks.size // 64, np.float32)
        kernels.quantize_4bit_as_cuda(blocks, dtype, quant_type, packed, absmax)
        codes, scales = torch.ops.bitsandbytes.quantize_4bit(on_gpu(blocks, dtype), 64, quant_type, torch.uint8)
        unlike = int((codes.view(-1).cpu().numpy() != packed).sum())
        return unlike + int((scales.cpu().numpy().view(np.uint32) != absmax.view(np.uint32)).sum())

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(differences, [range(start, min(start + 32, limit)) for start in range(0, limit, 32)])
        assert sum(found) == 0


def test_every_int8_code_and_scale_is_the_gpus() -> None:
    known("int8", "F16")
    every = np.arange(tables.infinity_bits("F16"), dtype=np.uint16)
    grid = np.concatenate([every, every | 0x8000])

    def differences(tops: range) -> int:
        rows = magnitudes_within(tops, grid)
        weight, scb = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
        kernels.quantize_int8_as_cuda(rows, "F16", weight, scb)
        codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(on_gpu(rows, "F16"), 0.0)
        return int((codes.cpu().numpy() != weight).sum()) + int((scales.float().cpu().numpy() != scb).sum())

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(differences, [range(start, min(start + 32, every.size)) for start in range(0, every.size, 32)])
        assert sum(found) == 0
