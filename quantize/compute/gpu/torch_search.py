"""Scale search in torch, on any device: the fallback where numba cannot be imported, and the way of the GPUs.

Every operation is elementwise in float32 or a sum in a fixed order, so each device and backend finds the same bits.
``scale_search`` documents the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch  # noqa: TID253 (this module is imported lazily)

from qz.quantize.compute import scale_search, tables
from qz.quantize.compute.gpu import cuda_kernels
from qz.quantize.compute.once import once

_BLOCKS = {"cpu": 1 << 10}
"""Blocks at a time, by the kind of device: what stays in the cache, or bounds the temporaries."""


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """What an error counts: ``tiled`` by column (``scale_search.tiled_weights``); ``column`` is where blocks begin."""

    tiled: torch.Tensor
    column: int

    @property
    def columns(self) -> int:
        return self.tiled.numel() - 64

    def of(self, start: int, stop: int) -> torch.Tensor:
        """float32 (blocks, 64), of the blocks from ``start``."""
        first = (self.column + 64 * torch.arange(start, stop, device=self.tiled.device)) % self.columns
        return self.tiled[first.unsqueeze(1) + torch.arange(64, device=self.tiled.device)]


def improve(
    values: torch.Tensor, weights: BlockWeights | None, quant_type: str, packed: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor | None:
    """Improve ``packed`` and ``scales``, which begin as absmax gives them, in place where the search finds better.

    ``values``: 1-D of the float dtype that they are loaded in; a short last block counts as filled up with zeros.
    ``packed``: uint8[ceil(n / 2)]. ``scales``: float32[ceil(n / 64)]. Where a kernel does it, the return is float32[1]
    on the device: infinity if a value is not finite, else 0.
    """
    if (function := cuda_kernels.kernel("search", values.device)) is not None:
        return _launch(function, values, weights, quant_type, packed, scales)
    step = _BLOCKS.get(values.device.type, 1 << 18)
    for start in range(0, scales.numel(), step):
        part = slice(start, start + step)
        x, codes = values[start * 64 : part.stop * 64], packed[start * 32 : part.stop * 32]
        blocks = torch.nn.functional.pad(x, (0, -x.numel() % 64)).view(-1, 64)
        of_blocks = None if weights is None else weights.of(start, start + len(blocks))
        found, better = _search(blocks, of_blocks, quant_type, scales[part])
        chosen = torch.where(
            better.repeat_interleave(32)[: codes.numel()], packed_pairs(found.codes)[: codes.numel()], codes
        )
        codes.copy_(chosen)
        scales[part] = torch.where(better, found.scales, scales[part])
    return None


def _launch(
    function: Any,
    values: torch.Tensor,
    weights: BlockWeights | None,
    quant_type: str,
    packed: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """``improve`` in one pass of ``cuda_source.SEARCH``."""
    device = values.device
    known, on_grid, candidates = _search_tables(quant_type, device)
    seen = torch.zeros(1, device=device)
    tiled, column, columns = (known, 0, 0) if weights is None else (weights.tiled, weights.column, weights.columns)
    cuda_kernels.launch(
        function, device, -(-scales.numel() // 4), values, values.numel(), cuda_kernels.KINDS[values.dtype], known,
        on_grid, candidates[weights is not None], tiled, column, columns, packed, scales, scales.numel(), seen,
    )  # fmt: skip
    return seen


@once
def _search_tables(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """What ``cuda_source.SEARCH`` knows: float32 bounds, levels, limits and inverses; int32 codes of the levels, then
    bounds and levels on the grid of each candidate; the number of candidates without importance and with it."""
    bounds, levels, order = table_tensors(quant_type, torch.device("cpu"))
    limits = [scale_search.LEAST_ABSMAX, scale_search.MOST_ABSMAX, scale_search.LEAST_GAIN, scale_search.GRID]
    inverses, coarse = scale_search.inverse_candidates(quant_type), scale_search.coarse_candidates(quant_type)
    known = torch.cat([bounds, levels, torch.tensor([*limits, *inverses], dtype=torch.float32)])
    on_grid = np.concatenate([order.numpy(), *(each for pair in coarse for each in pair)]).astype(np.int32)
    return known.to(device), torch.from_numpy(on_grid).to(device), (len(coarse), len(inverses))


def encode(values: torch.Tensor, quant_type: str, scales: torch.Tensor, packed: torch.Tensor) -> None:
    """``packed`` = the codes nearest to ``values`` (1-D) under the given ``scales``, of any sign; 0 gives zeros."""
    bounds, _, order = table_tensors(quant_type, values.device)
    step = _BLOCKS.get(values.device.type, 1 << 18)
    for start in range(0, scales.numel(), step):
        x, out = values[start * 64 : (start + step) * 64], packed[start * 32 : (start + step) * 32]
        blocks = torch.nn.functional.pad(x.float(), (0, -x.numel() % 64)).view(-1, 64)
        given = scales[start : start + step].unsqueeze(1)
        usable = given.abs() >= scale_search.LEAST_SCALE
        scaled = torch.where(usable, blocks * (1.0 / torch.where(usable, given, 1.0)), 0.0)
        out.copy_(packed_pairs(order[torch.bucketize(scaled, bounds, out_int32=True)])[: out.numel()])


@dataclass(frozen=True, slots=True)
class _Found:
    codes: torch.Tensor
    scales: torch.Tensor


def _search(
    values: torch.Tensor, weights: torch.Tensor | None, quant_type: str, scales: torch.Tensor
) -> tuple[_Found, torch.Tensor]:
    """What is found for blocks (blocks, 64), and where it is better than absmax."""
    bounds, levels, order = table_tensors(quant_type, values.device)
    usable = (scales > scale_search.LEAST_ABSMAX) & (scales < scale_search.MOST_ABSMAX)
    absmax = torch.where(usable, scales, 1.0)
    inverse = (1.0 / absmax).unsqueeze(1)
    x = torch.where(usable.unsqueeze(1), values.float(), 0.0)
    y = x * inverse
    best, sigma = torch.full_like(scales, -1.0), torch.ones_like(scales)

    def sums(inverses: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of the levels nearest to ``y * inverses``."""
        q = levels[torch.bucketize(y * inverses, bounds, out_int32=True)]
        wq = q if weights is None else weights * q
        return _sum(wq * y), _sum(wq * q)

    def compare(a: torch.Tensor, b: torch.Tensor) -> None:
        """Keep the candidate where it removes more error."""
        nonlocal best, sigma
        gain = a * a / b
        better = gain > best
        best, sigma = torch.where(better, gain, best), torch.where(better, a / b, sigma)

    def error(position: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        loaded = (levels[position] * scale.unsqueeze(1)).to(values.dtype).float()
        difference = (loaded - x) * inverse
        squared = difference * difference
        return _sum(squared if weights is None else weights * squared)

    if weights is None:
        whole = torch.round(y * scale_search.GRID).to(torch.int32)
        for cuts, grid_levels in scale_search.coarse_candidates(quant_type):
            q = torch.from_numpy(grid_levels).to(whole)[torch.bucketize(whole, torch.from_numpy(cuts).to(whole))]
            compare((whole * q).sum(1).float(), (q * q).sum(1).float())
    else:
        for candidate in scale_search.inverse_candidates(quant_type):
            compare(*sums(candidate))
    a, b = sums((1.0 / sigma).unsqueeze(1))
    sigma = a / b
    found = absmax * sigma
    position = torch.bucketize(x * (1.0 / found).unsqueeze(1), bounds, out_int32=True)
    limit = error(torch.bucketize(y, bounds, out_int32=True), absmax) * scale_search.LEAST_GAIN
    return _Found(order[position], found), usable & (error(position, found) < limit)


def packed_codes(codes: torch.Tensor, quant_type: str) -> torch.Tensor:
    """uint8[ceil(n / 2)] of n codes; a last byte of one code is filled up with that of zero."""
    padded = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=_zero_code(quant_type))
    return packed_pairs(padded)


def packed_pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8[n / 2] of an even number of codes, the first of a pair in the high half."""
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


@once
def table_tensors(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bounds, float32[15], levels in ascending order, float32[16], and the codes of these levels, uint8[16]."""
    order = tables.order(quant_type)
    levels = torch.from_numpy(tables.QUANT_MAPS[quant_type][order])
    return torch.from_numpy(tables.bounds(quant_type)).to(device), levels.to(device), torch.from_numpy(order).to(device)


def _zero_code(quant_type: str) -> int:
    return int(tables.order(quant_type)[int((tables.bounds(quant_type) < 0).sum())])


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Over the 64 values of each block, by halves: the order of additions that every backend keeps."""
    for half in (32, 16, 8, 4, 2, 1):
        values = values[:, :half] + values[:, half:]
    return values[:, 0]
