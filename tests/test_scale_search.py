"""The kernels of the scale search: less error in the same format, no block worse, the same bits on every backend."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch

import portable_cpu
from qz.quantize.compute import kernels, scale_search, tables
from test_kernels import (
    DTYPES,
    Array,
    QuantType,
    each_dtype,
    each_quant_type,
    on_x86_64,
    python,
    random_values,
    same,
    use,
)

COLUMNS = 97
"""Of a row whose blocks begin at every column in turn."""


def importance(columns: int = COLUMNS) -> Array:
    """Some inputs count thousands of times what others do."""
    values = np.random.default_rng(1).random(columns).astype(np.float32) ** 8 + 1e-3
    scaled: Array = values / values.mean()
    return scaled


def searched(
    values: Array, dtype: str, quant_type: QuantType, weights: Array | None = None, column: int = 0
) -> tuple[Array, Array, kernels.NonFinite]:
    packed, scales = np.full(-(-values.size // 2), 0xA5, np.uint8), np.full(-(-values.size // 64), -1, np.float32)
    tiled = None if weights is None else scale_search.tiled_weights(weights)
    return packed, scales, kernels.search_4bit(values, dtype, quant_type, tiled, column, packed, scales)


def by_absmax(values: Array, dtype: str, quant_type: QuantType) -> tuple[Array, Array]:
    packed, scales = np.empty(-(-values.size // 2), np.uint8), np.empty(-(-values.size // 64), np.float32)
    kernels.quantize_4bit(values, dtype, quant_type, packed, scales)
    return packed, scales


def wide(values: Array, dtype: str) -> Array:
    exact: Array = (values if dtype == "F32" else tables.widen(values, dtype)).astype(np.float64)
    return exact


def block_errors(
    values: Array, dtype: str, quant_type: QuantType, made: tuple[Array, Array], weights: Array | None = None
) -> Array:
    """Weighted squared error of each block as it is loaded in ``dtype``, in float64."""
    packed, scales = made
    out = np.empty(values.size, values.dtype)
    kernels.dequantize_4bit(packed, scales, quant_type, 64, dtype, out)
    squared = (wide(out, dtype) - wide(values, dtype)) ** 2
    squared *= 1 if weights is None else np.resize(weights, values.size)
    return np.add.reduceat(squared, np.arange(0, values.size, 64))


def rare_values(dtype: str) -> Array:
    """Outliers, blocks of zeros, equal values and one sign, tiny and huge ones, and a short last block."""
    rng = np.random.default_rng(3)
    blocks = rng.standard_normal((64, 64)).astype(np.float32)
    blocks[0] = 0
    blocks[1] = 1.5
    blocks[2] = np.abs(blocks[2])
    blocks[3, 1:] = 0
    blocks[4, 5] = 60
    blocks[5] = np.float32(2.0**-14) * blocks[5]
    blocks[6] = np.float32(2.0**-24) * np.sign(blocks[6])
    blocks[7] = 60000 * np.clip(blocks[7], -1, 1)
    if dtype != "F16":
        blocks[8:12] *= np.array([[1e-39], [1e-31], [1e-29], [1e-20]], np.float32)
        blocks[12:16] *= np.array([[2e37], [2e30], [2e28], [2e19]], np.float32)
    flat = np.concatenate([blocks.reshape(-1), rng.standard_normal(37).astype(np.float32)])
    if dtype == "F32":
        return flat
    bits: Array = torch.from_numpy(flat).to(DTYPES[dtype]).view(torch.uint16).numpy()
    return bits


@each_dtype
@each_quant_type
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_no_block_is_worse_than_by_absmax_and_both_backends_find_the_same(
    weighted: bool, quant_type: QuantType, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = importance() if weighted else None
    for values in (random_values(200 * COLUMNS, dtype), rare_values(dtype)):
        use("numba", monkeypatch)
        packed, scales, found = searched(values, dtype, quant_type, weights)
        with np.errstate(all="ignore"):
            new = block_errors(values, dtype, quant_type, (packed, scales), weights)
            old = block_errors(values, dtype, quant_type, by_absmax(values, dtype, quant_type), weights)
        assert found == kernels.NonFinite(0, -1)
        assert bool((new <= old).all())
        use("torch", monkeypatch)
        again = searched(values, dtype, quant_type, weights)
        assert same(again[0], packed)
        assert same(again[1], scales)


@each_quant_type
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_the_search_comes_close_to_the_best_scales_there_are(quant_type: QuantType, weighted: bool) -> None:
    """Against 4,000 scales for each block, tried one after the other in float64."""
    values = random_values(64 * 48, "F32", 1.0, seed=5)
    weights = importance(64) if weighted else None
    packed, scales, _ = searched(values, "F32", quant_type, weights)
    new = block_errors(values, "F32", quant_type, (packed, scales), weights)
    old = block_errors(values, "F32", quant_type, by_absmax(values, "F32", quant_type), weights)
    blocks = values.reshape(-1, 64).astype(np.float64)
    w = np.ones(64) if weights is None else weights.astype(np.float64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    levels = np.sort(tables.QUANT_MAPS[quant_type].astype(np.float64))
    bounds = (levels[:-1] + levels[1:]) / 2
    best = np.full(len(blocks), np.inf)
    for factor in np.linspace(0.2, 1.4, 2000):
        for scale in (absmax * factor, absmax * -factor):
            near = levels[np.searchsorted(bounds, blocks / scale)] * scale
            best = np.minimum(best, ((near - blocks) ** 2 * w).sum(axis=1))
    gained, possible = 1 - new.sum() / old.sum(), 1 - best.sum() / old.sum()
    assert gained >= 0.9 * possible
    assert possible > 0.1


@each_dtype
def test_what_is_not_finite_is_left_to_the_reference_and_counted(dtype: str) -> None:
    values = random_values(64 * 5 + 11, dtype)
    bad = {"F32": np.float32(np.nan), "F16": np.uint16(0x7E00), "BF16": np.uint16(0x7F80)}[dtype]
    values[70] = values[71] = values[64 * 5 + 3] = bad
    packed, scales, found = searched(values, dtype, "nf4")
    reference = by_absmax(values, dtype, "nf4")
    assert found == kernels.NonFinite(3, 70)
    assert same(packed[32:64], reference[0][32:64])
    assert same(scales[[1, 5]], reference[1][[1, 5]])
    assert bool((scales[[0, 2, 3, 4]] != reference[1][[0, 2, 3, 4]]).any())


@each_dtype
@each_quant_type
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_codes_for_given_scales_are_the_nearest(
    backend: str, dtype: str, quant_type: QuantType, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(backend, monkeypatch)
    values = random_values(64 * 9 + 5, dtype, 1.0)
    scales = np.array([1, -1, 3, -0.25, 1e-3, -50, 0, 1e-39, 2, -2], np.float32)
    packed = np.full(-(-values.size // 2), 0xA5, np.uint8)
    kernels.encode_4bit(values, dtype, quant_type, scales, packed)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: values.size]
    near = tables.QUANT_MAPS[quant_type][codes].astype(np.float64) * np.repeat(scales, 64)[: values.size]
    every = np.sort(tables.QUANT_MAPS[quant_type]).astype(np.float64) * np.repeat(scales, 64)[: values.size, None]
    distance = np.abs(every - wide(values, dtype)[:, None]).min(axis=1)
    assert np.allclose(np.abs(near - wide(values, dtype)), distance, rtol=1e-5, atol=1e-6)
    assert not near[6 * 64 : 8 * 64].any()


@each_quant_type
def test_values_next_to_the_bounds_of_codes_and_of_lookups_have_the_same_codes(
    quant_type: QuantType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that cut the range into cells, sixteenths of it or 256 steps of the grid, and those that compare."""
    steps = [bound * factor for bound in tables.bounds(quant_type) for factor in scale_search.FACTORS[quant_type]]
    edges = np.array([*tables.bounds(quant_type), *steps, *(np.arange(-40, 41) / 16), 0.5 / 4096], np.float32)
    near = [edges, *(edges + np.float32(by) for by in (2.0**-17, -(2.0**-17), 1 / 4096, -1 / 4096))]
    values = np.concatenate([np.nextafter(each, np.float32(way)) for each in near for way in (-9, 0, 9)] + near)
    values = np.resize(np.concatenate([values, -values]), 64 * 64)
    made = {}
    for backend in ("numba", "torch"):
        use(backend, monkeypatch)
        codes = np.empty(values.size // 2, np.uint8)
        kernels.encode_4bit(values, "F32", quant_type, np.resize(np.array([1, -1], np.float32), 64), codes)
        inside = np.clip(values, -1, 1).reshape(64, 64)
        inside[:, 0] = 1  # the absmax
        made[backend] = (codes, *searched(inside.reshape(-1), "F32", quant_type)[:2])
    assert all(same(*pair) for pair in zip(made["numba"], made["torch"], strict=True))


def test_the_same_scales_come_of_searching_in_pieces() -> None:
    """A chunk begins anywhere in a row; what is found for a block does not depend on it."""
    values, weights = random_values(COLUMNS * 64 * 12, "BF16"), importance()
    whole = searched(values, "BF16", "nf4", weights)
    for start in (0, 64 * 5, 64 * COLUMNS, 64 * 1000):
        piece = values[start : start + 64 * 30]
        packed, scales, _ = searched(piece, "BF16", "nf4", weights, start % COLUMNS)
        assert same(packed, whole[0][start // 2 : start // 2 + packed.size])
        assert same(scales, whole[1][start // 64 : start // 64 + scales.size])


SCRIPT = """
import hashlib
import numpy as np
from qz.quantize.compute import kernels, scale_search
values = np.random.default_rng(0).standard_normal(64 * 500).astype(np.float32)
for weights in (None, scale_search.tiled_weights(np.random.default_rng(1).random(97).astype(np.float32) ** 4)):
    packed, scales = np.empty(values.size // 2, np.uint8), np.empty(values.size // 64, np.float32)
    kernels.search_4bit(values, "F32", "nf4", weights, 0, packed, scales)
    print(hashlib.sha256(packed.tobytes() + scales.tobytes()).hexdigest())
"""


@on_x86_64
def test_a_cpu_without_avx_512_finds_the_same_bits() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(SCRIPT, {})
    mine = told.getvalue().strip()
    assert len(set(mine.split())) == 2
    assert python(SCRIPT, **portable_cpu.ENVIRONMENT) == mine
