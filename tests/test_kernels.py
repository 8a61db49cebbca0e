"""The kernels against bitsandbytes' own CPU operations, bit for bit, with both backends."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes.backends.default import ops as reference_ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

import portable_cpu
import qz
from qz.quantize.compute import backends, kernels, tables
from qz.quantize.compute.kernels import NonFinite
from reference import with_one_zero

Array = npt.NDArray[Any]
QuantType = Literal["nf4", "fp4"]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
QUANT_TYPES: tuple[QuantType, ...] = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

each_dtype = pytest.mark.parametrize("dtype", list(DTYPES))
each_quant_type = pytest.mark.parametrize("quant_type", QUANT_TYPES)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """So that the reference is the same on every machine, and quick on a busy one: bitsandbytes compiles some of its
    operations for each shape, which takes seconds; whole models are compared with those."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=["numba", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    use(name, monkeypatch)
    return name


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = {"numba": "qz.quantize.compute.cpu.numba_kernels", "torch": "qz.quantize.compute.gpu.torch_kernels"}[name]
    for which in ("backend", "block_backend"):
        monkeypatch.setattr(kernels, which, lambda: importlib.import_module(path))


def to_torch(values: Array, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.array(values)).view(DTYPES[dtype])


def to_numpy(values: torch.Tensor) -> Array:
    """Bits of 16-bit dtypes, float32 otherwise."""
    plain: Array = values.view(torch.uint16).numpy() if values.dtype.itemsize == 2 else values.numpy()
    return plain


def same(ours: Array, theirs: Array) -> bool:
    """Bit for bit: of the NaN payloads and the sign of zero, too."""
    return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


def random_values(shape: int | tuple[int, ...], dtype: str, scale: float = 0.02, seed: int = 0) -> Array:
    generator = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    return to_numpy((torch.randn(*shape, generator=generator) * scale).to(DTYPES[dtype]))


def quantize_4bit(values: Array, dtype: str, quant_type: QuantType) -> tuple[Array, Array, NonFinite]:
    # Filled with rubbish: every byte of the outputs must be written.
    packed, absmax = np.full(-(-values.size // 2), 0xA5, np.uint8), np.full(-(-values.size // 64), -1, np.float32)
    return packed, absmax, kernels.quantize_4bit(values, dtype, quant_type, packed, absmax)


def assert_4bit_is_exact(values: Array, dtype: str, quant_type: QuantType) -> None:
    original = to_torch(values, dtype)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(original, 64, quant_type, torch.uint8)
    ours_packed, ours_absmax, non_finite = quantize_4bit(values, dtype, quant_type)
    assert same(ours_absmax, absmax.numpy())
    assert same(ours_packed, packed.numpy().reshape(-1))
    assert non_finite == expected_non_finite(original)


def expected_non_finite(values: torch.Tensor) -> NonFinite:
    bad = (~torch.isfinite(values.reshape(-1))).nonzero().reshape(-1)
    return NonFinite(len(bad), int(bad[0]) if len(bad) else -1)


def assert_int8_is_exact(values: Array, dtype: str) -> None:
    original = to_torch(values, dtype)
    reference: Any = bnb.nn.Int8Params(original.clone(), requires_grad=False).to("cpu")
    weight, scb = np.full(values.shape, 99, np.int8), np.full(values.shape[0], -1, np.float32)
    non_finite = kernels.quantize_int8(values, dtype, weight, scb)
    # Which NaN a float16 cast gives depends, in torch itself, on where in the tensor the value lies.
    assert np.array_equal(scb, reference.SCB.numpy(), equal_nan=True)
    assert same(weight, reference.data.numpy())
    assert non_finite == expected_non_finite(original.half())


def ordered(bits: Array) -> Array:
    """16-bit floats as integers in the order of their values; its own inverse."""
    signed = bits.view(np.int16)
    return (signed ^ ((signed >> 15) & 0x7FFF)).astype(np.int16)


# Tables


@each_quant_type
def test_quant_maps_and_bounds_are_those_of_bitsandbytes(quant_type: QuantType) -> None:
    assert same(tables.QUANT_MAPS[quant_type], bnb_functional.get_4bit_type(quant_type, device="cpu").numpy())
    bounds, order = reference_ops._get_4bit_quantize_bounds(quant_type, torch.device("cpu"))
    assert same(tables.bounds(quant_type), bounds.numpy())
    assert tables.order(quant_type).tolist() == order.tolist()


def test_nested_quant_map_is_that_of_bitsandbytes() -> None:
    assert same(tables.nested_quant_map(), bnb_functional.create_dynamic_map().numpy())


# 4-bit


@each_quant_type
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_cut_point_is_exact(dtype: str, quant_type: QuantType) -> None:
    """A block for every finite absmax, with the values on both sides of every cut; the rest follows by monotony."""
    limit = tables.infinity_bits(dtype)
    absmax = np.arange(limit, dtype=np.uint16)
    cuts = tables.cut_points(quant_type, dtype)[:limit, :15].astype(np.int32)
    sides = np.concatenate([cuts - 1, cuts, cuts + 1, cuts + 2], axis=1)
    largest = absmax.astype(np.int32)[:, None]
    sides = np.clip(sides, ~largest, largest).astype(np.int16)
    blocks = np.zeros((limit, 64), np.uint16)
    blocks[:, 1:61] = ordered(sides).view(np.uint16)
    blocks[:, 0], blocks[:, 61], blocks[:, 63] = absmax, absmax | 0x8000, 0x8000
    assert_4bit_is_exact(blocks.reshape(-1), dtype, quant_type)


@each_quant_type
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_bit_pattern_is_exact_under_many_scales(dtype: str, quant_type: QuantType, backend: str) -> None:
    limit = tables.infinity_bits(dtype)
    patterns = np.arange(65536, dtype=np.uint16)
    magnitude = patterns & 0x7FFF
    generator = np.random.default_rng(1)
    scales = [0, 1, 2, limit // 2, limit - 2, limit - 1, *generator.integers(0, limit, 14 if backend == "numba" else 2)]
    for scale in scales:
        inside = patterns[magnitude <= scale]
        inside = np.pad(inside, (0, -inside.size % 63)).reshape(-1, 63)
        blocks = np.concatenate([inside, np.full((len(inside), 1), scale, np.uint16)], axis=1)
        assert_4bit_is_exact(blocks.reshape(-1), dtype, quant_type)


@each_quant_type
def test_float32_is_exact_next_to_every_midpoint(quant_type: QuantType, backend: str) -> None:
    generator = np.random.default_rng(2)
    scales = np.exp2(generator.uniform(-148, 127, 4000)).astype(np.float32)
    scales[:6] = [1e-38, 1.4e-45, 1.1754944e-38, 3.4e38, 1.0, 0.0]
    middle = tables.bounds(quant_type)[None, :] * scales[:, None]
    blocks = np.zeros((len(scales), 64), np.float32)
    blocks[:, 0] = scales
    for i, steps in enumerate((-1, 0, 1)):
        blocks[:, 1 + 15 * i : 16 + 15 * i] = (middle.view(np.int32) + steps).view(np.float32)
    blocks = np.where(np.abs(blocks) <= scales[:, None], blocks, 0).astype(np.float32)
    assert_4bit_is_exact(blocks.reshape(-1), "F32", quant_type)


@each_dtype
@each_quant_type
def test_every_length_is_exact(dtype: str, quant_type: QuantType, backend: str) -> None:
    """Short last blocks, odd lengths, one value, none."""
    values = random_values(260, dtype)
    for length in [*range(1, 68), 127, 128, 129, 191, 192, 193, 260]:
        assert_4bit_is_exact(values[:length], dtype, quant_type)
    packed, absmax, non_finite = quantize_4bit(values[:0], dtype, quant_type)
    assert (packed.size, absmax.size, non_finite) == (0, 0, NonFinite(0, -1))


@each_dtype
@each_quant_type
def test_zeros_and_subnormals_are_exact(dtype: str, quant_type: QuantType, backend: str) -> None:
    for scale in (0.0, -0.0, 1e-45, 1e-42, 1e-40, 1e-38, 1.2e-38, 1e-30, 1e-7, 6e-8):
        for length in (64 * 3, 64 + 31, 17):
            assert_4bit_is_exact(random_values(length, dtype, scale), dtype, quant_type)


@each_dtype
@each_quant_type
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_blocks_with_non_finite_values_are_exact_and_counted(
    dtype: str, quant_type: QuantType, bad: float, backend: str
) -> None:
    values = to_torch(random_values(64 * 2100 + 37, dtype), dtype)
    values[[70, 71, 64 * 9, 64 * 2050 + 63, 64 * 2100 + 5]] = bad
    values[65] = float("inf")
    assert_4bit_is_exact(to_numpy(values), dtype, quant_type)
    only_tail = to_torch(random_values(64 + 37, dtype), dtype)
    only_tail[-1] = bad
    assert_4bit_is_exact(to_numpy(only_tail), dtype, quant_type)
    assert_4bit_is_exact(to_numpy(torch.full((200,), bad, dtype=DTYPES[dtype])), dtype, quant_type)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(["BF16", "F16"]), quant_type=st.sampled_from(QUANT_TYPES))
def test_any_bits_are_exact(data: st.DataObject, dtype: str, quant_type: QuantType, backend: str) -> None:
    bits = data.draw(numpy_strategies.arrays(np.uint16, st.integers(1, 300), elements=st.integers(0, 0xFFFF)))
    assert_4bit_is_exact(bits, dtype, quant_type)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), quant_type=st.sampled_from(QUANT_TYPES))
def test_any_float32_is_exact(data: st.DataObject, quant_type: QuantType, backend: str) -> None:
    values = data.draw(numpy_strategies.arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32)))
    assert_4bit_is_exact(values, "F32", quant_type)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 1000),
    cuts=st.lists(st.integers(0, 15), max_size=4),
    dtype=st.sampled_from(list(DTYPES)),
    quant_type=st.sampled_from(QUANT_TYPES),
)
def test_chunks_of_whole_blocks_give_the_bytes_of_the_whole(
    length: int, cuts: list[int], dtype: str, quant_type: QuantType
) -> None:
    values = random_values(length, dtype, seed=length)
    whole_packed, whole_absmax, _ = quantize_4bit(values, dtype, quant_type)
    edges = sorted({0, length, *(min(64 * cut, length) for cut in cuts)})
    parts = [quantize_4bit(values[a:b], dtype, quant_type) for a, b in pairwise(edges)]
    assert same(np.concatenate([part[0] for part in parts]), whole_packed)
    assert same(np.concatenate([part[1] for part in parts]), whole_absmax)


# int8


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_int8_is_exact_for_every_bit_pattern(dtype: str, backend: str) -> None:
    """Rows of neighbouring patterns share a scale; a shuffle mixes magnitudes. Some overflow float16, some are NaN."""
    patterns = np.arange(65536, dtype=np.uint16)
    assert_int8_is_exact(patterns.reshape(-1, 64), dtype)
    finite = patterns[np.isfinite(to_torch(patterns, dtype).half().float().numpy())]
    shuffled = np.random.default_rng(3).permutation(finite)
    assert_int8_is_exact(shuffled[: shuffled.size // 96 * 96].reshape(-1, 96), dtype)


@each_dtype
def test_int8_rounds_ties_to_even(dtype: str, backend: str) -> None:
    halves = torch.arange(-127, 127.5, 0.5)
    for absmax in (127.0, 254.0, 63.5, 127.0 * 2**-10):
        rows = torch.cat([halves * absmax / 127, torch.tensor([absmax])]).to(DTYPES[dtype])
        assert_int8_is_exact(to_numpy(rows.reshape(1, -1)), dtype)


def test_int8_rounds_float32_to_float16_as_torch_does(backend: str) -> None:
    """Midpoints between float16 neighbours, normal and subnormal, ± 1 ulp, and the edge of overflow at 65,520."""
    half = tables.magnitudes("F16")[: 0x7C00 - 1]
    middle = (half[:-1] + half[1:]) / 2
    near = np.concatenate([(middle.view(np.int32) + step).view(np.float32) for step in (-1, 0, 1)])
    signed = np.concatenate([near, -near])
    rows = np.sort(signed)[: signed.size // 128 * 128].reshape(-1, 128)
    assert_int8_is_exact(np.ascontiguousarray(rows), "F32")
    edge = np.array([[1.0, 65519.996], [65520.0, 1.0], [-65519.996, 2.0], [-65520.0, 3e38]], np.float32)
    assert_int8_is_exact(edge, "F32")


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 200), (5, 17), (40, 64), (33, 1000), (2, 70000)])
def test_int8_is_exact_for_every_shape_and_scale(shape: tuple[int, int], dtype: str, backend: str) -> None:
    for scale in (0.0, 1e-9, 3e-8, 1e-6, 1e-3, 1.0, 2e4):
        values = random_values(shape, dtype, scale)
        values[0] = 0
        assert_int8_is_exact(values, dtype)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES)))
def test_int8_is_exact_for_any_values(data: st.DataObject, dtype: str, backend: str) -> None:
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 40)))
    if dtype == "F32":
        values = data.draw(numpy_strategies.arrays(np.float32, shape, elements=st.floats(width=32)))
    else:
        values = data.draw(numpy_strategies.arrays(np.uint16, shape, elements=st.integers(0, 0xFFFF)))
    assert_int8_is_exact(values, dtype)


@each_dtype
def test_int8_counts_what_is_not_finite_in_float16(dtype: str, backend: str) -> None:
    values = to_torch(random_values((6, 50), dtype), dtype)
    values[2, 7], values[2, 9], values[4, 0] = float("nan"), -float("inf"), 70000.0
    assert_int8_is_exact(to_numpy(values), dtype)
    weight, scb = np.empty((6, 50), np.int8), np.empty(6, np.float32)
    assert kernels.quantize_int8(to_numpy(values), dtype, weight, scb) == NonFinite(3, 107)


# Dequantization


def dequantize_4bit(packed: Array, absmax: Array, quant_type: QuantType, blocksize: int, dtype: str, n: int) -> Array:
    out = np.full(n, 7, np.float32 if dtype == "F32" else np.uint16)
    kernels.dequantize_4bit(packed, absmax, quant_type, blocksize, dtype, out)
    return out


# Of rows of 4,096 values and blocks below 2,048, bitsandbytes uses AVX-512 where the CPU has it; of rows of two values,
# its portable code on every CPU.
@each_dtype
@each_quant_type
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_4bit_dequantization_is_exact(blocksize: int, dtype: str, quant_type: QuantType, backend: str) -> None:
    packed = np.random.default_rng(4).integers(0, 256, 8192, np.uint8)
    blocks = 16384 // blocksize
    absmax = np.exp2(np.random.default_rng(5).uniform(-30, 20, blocks)).astype(np.float32)
    absmax[0] = 0
    ours = dequantize_4bit(packed, absmax, quant_type, blocksize, dtype, 16384)
    for columns in (4096, 2):
        theirs = torch.ops.bitsandbytes.dequantize_4bit(
            torch.from_numpy(packed),
            torch.from_numpy(absmax),
            blocksize,
            quant_type,
            (16384 // columns, columns),
            DTYPES[dtype],
        ).reshape(-1)
        expected = with_one_zero(theirs, torch.from_numpy(packed)) if quant_type == "fp4" else theirs
        assert same(ours, to_numpy(expected))


@each_dtype
@pytest.mark.parametrize("columns", [2, 4096])
def test_the_second_zero_of_fp4_is_that_of_the_quant_map_whatever_bitsandbytes_makes_of_it(
    columns: int, dtype: str, backend: str
) -> None:
    """bitsandbytes' sign depends on the CPU and on the length of a row; qz's bytes are the same everywhere."""
    packed, absmax = np.full(4096, 0x88, np.uint8), np.full(128, 3, np.float32)
    assert math.copysign(1, tables.QUANT_MAPS["fp4"][8]) == 1
    ours = dequantize_4bit(packed, absmax, "fp4", 64, dtype, 8192)
    assert not ours.any(), "all bits are zero, the sign as well"
    theirs = torch.ops.bitsandbytes.dequantize_4bit(
        torch.from_numpy(packed), torch.from_numpy(absmax), 64, "fp4", (8192 // columns, columns), DTYPES[dtype]
    )
    assert not theirs.any(), "a zero of either sign"
    if columns == 2:
        assert bool(theirs.signbit().all()), "the portable code gives -0.0; qz's documentation says so"


@each_dtype
@each_quant_type
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_4bit_dequantization_of_any_length_is_exact(
    blocksize: int, dtype: str, quant_type: QuantType, backend: str
) -> None:
    """Against the formula: bitsandbytes' AVX-512 path takes the wrong absmax where rows are no multiple of blocks."""
    quant_map = torch.from_numpy(tables.QUANT_MAPS[quant_type])
    for n in (1, 2, 31, 32, 33, 63, 65, 95, 96, 4095, 4097, 8193):
        packed = np.random.default_rng(n).integers(0, 256, -(-n // 2), np.uint8)
        absmax = np.exp2(np.random.default_rng(n).uniform(-150, 127, -(-n // blocksize))).astype(np.float32)
        codes = torch.from_numpy(np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n].astype(np.int64))
        scales = torch.from_numpy(np.repeat(absmax, blocksize)[:n].copy())
        theirs = (quant_map[codes] * scales).to(DTYPES[dtype])
        assert same(dequantize_4bit(packed, absmax, quant_type, blocksize, dtype, n), to_numpy(theirs))


@each_dtype
def test_a_broken_absmax_dequantizes_to_nan_or_infinity(dtype: str, backend: str) -> None:
    absmax = np.array([np.nan, np.inf], np.float32)
    out = dequantize_4bit(np.full(64, 0xF0, np.uint8), absmax, "nf4", 64, dtype, 128)
    values = to_torch(out, dtype).float()
    assert bool(values[:64].isnan().all())
    assert values[64:].tolist() == [float("inf"), -float("inf")] * 32


@each_dtype
def test_int8_dequantization_is_exact(dtype: str, backend: str) -> None:
    weight = np.tile(np.arange(-128, 128).astype(np.int8), (300, 1))
    scb = np.exp2(np.random.default_rng(6).uniform(-24, 16, 300)).astype(np.float32)
    scb[0] = 0
    theirs = bnb_functional.int8_vectorwise_dequant(torch.from_numpy(weight), torch.from_numpy(scb)).to(DTYPES[dtype])
    out = np.empty(weight.shape, np.float32 if dtype == "F32" else np.uint16)
    kernels.dequantize_int8(weight, scb, dtype, out)
    assert same(out, to_numpy(theirs))


# Double quantization


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000, 32768, 70001])
def test_double_quantization_is_exact(n: int, backend: str) -> None:
    absmax = np.abs(random_values(n, "F32", seed=n))
    offset = torch.from_numpy(absmax).mean()
    codes, state = bnb_functional.quantize_blockwise(torch.from_numpy(absmax) - offset, blocksize=256)
    quantized, nested, ours_offset = kernels.quantize_absmax(absmax)
    assert same(quantized, codes.numpy())
    assert same(nested, state.absmax.numpy())
    assert ours_offset == offset.item()
    theirs = bnb_functional.dequantize_blockwise(codes, state) + offset
    ours = kernels.dequantize_absmax(quantized, nested, tables.nested_quant_map(), ours_offset, 256)
    assert same(ours, theirs.numpy())


def test_every_step_of_the_nested_map_is_exact(backend: str) -> None:
    """Values around all 65,536 steps of the library's table, in one block-sized absmax range each."""
    values = np.linspace(-1, 1, 256 * 2000).astype(np.float32).reshape(-1, 256)
    values[:, 0] = 1
    codes, state = bnb_functional.quantize_blockwise(torch.from_numpy(values.reshape(-1)), blocksize=256)
    out, absmax = np.empty(values.size, np.uint8), np.empty(len(values), np.float32)
    backends.backend().quantize_blockwise(values.reshape(-1), 256, out, absmax)
    assert same(out, codes.numpy())
    assert same(absmax, state.absmax.numpy())


def test_equal_absmax_gives_zero_nested_absmax(backend: str) -> None:
    absmax = np.full(600, 0.25, np.float32)
    codes, state = bnb_functional.quantize_blockwise(torch.zeros(600), blocksize=256)
    quantized, nested, offset = kernels.quantize_absmax(absmax)
    assert offset == 0.25
    assert same(quantized, codes.numpy())
    assert same(nested, state.absmax.numpy())


def test_a_non_finite_absmax_is_quantized_as_bitsandbytes_does() -> None:
    absmax = np.abs(random_values(1000, "F32"))
    absmax[300] = np.inf
    values = torch.from_numpy(absmax)
    codes, state = bnb_functional.quantize_blockwise(values - values.mean(), blocksize=256)
    quantized, nested, offset = kernels.quantize_absmax(absmax)
    assert offset == np.inf
    assert same(quantized, codes.numpy())
    assert same(nested, state.absmax.numpy())


@each_quant_type
def test_the_whole_path_equals_functional_quantize_4bit(quant_type: QuantType) -> None:
    values = random_values((300, 128), "BF16")
    packed, state = bnb_functional.quantize_4bit(
        to_torch(values, "BF16"), compress_statistics=True, quant_type=quant_type
    )
    ours_packed, ours_absmax, _ = quantize_4bit(values.reshape(-1), "BF16", quant_type)
    quantized, nested, offset = kernels.quantize_absmax(ours_absmax)
    assert same(ours_packed, packed.numpy().reshape(-1))
    assert same(quantized, state.absmax.numpy())
    assert same(nested, state.state2.absmax.numpy())
    assert same(tables.nested_quant_map(), state.state2.code.numpy())
    assert offset == state.offset.item()


def test_double_quantization_does_not_depend_on_torchs_threads() -> None:
    absmax = np.abs(random_values(300_000, "F32"))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        quantized, nested, offset = kernels.quantize_absmax(absmax)
        assert torch.get_num_threads() == threads
        results.append((quantized.tobytes(), nested.tobytes(), offset))
    assert len(set(results)) == 1


# Threads, buffers, backends


def test_many_threads_give_the_bytes_of_one() -> None:
    values = random_values(64 * 20_000, "BF16")
    packed, absmax, _ = quantize_4bit(values, "BF16", "nf4")
    threaded_packed, threaded_absmax = np.zeros_like(packed), np.zeros_like(absmax)

    def work(block: int) -> NonFinite:
        part = slice(block * 64, (block + 100) * 64)
        return kernels.quantize_4bit(
            values[part],
            "BF16",
            "nf4",
            threaded_packed[block * 32 : (block + 100) * 32],
            threaded_absmax[block : block + 100],
        )

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(0, 20_000, 100))) == {NonFinite(0, -1)}
    assert same(threaded_packed, packed)
    assert same(threaded_absmax, absmax)


def test_the_gil_is_released() -> None:
    values = random_values(64 * 100_000, "BF16")
    outputs = np.empty(values.size // 2, np.uint8), np.empty(values.size // 64, np.float32)

    def work() -> None:
        for _ in range(20):
            kernels.quantize_4bit(values, "BF16", "nf4", *outputs)

    def turns() -> int:
        """Of this thread, while the other one works."""
        thread, count = threading.Thread(target=work), 0
        thread.start()
        while thread.is_alive():
            count += 1
        return count

    work()
    # Had each call kept the GIL, this thread would have had about one turn a call, of 5 ms: fewer than these. A busy
    # machine may give this thread no time at all for a while.
    assert any(turns() > 1000 for _ in range(100))


@each_dtype
def test_read_only_and_unaligned_buffers_do(dtype: str, backend: str) -> None:
    values = random_values(64 * 5 + 3, dtype)
    unaligned = np.frombuffer(b"\0" + values.tobytes(), np.uint8)[1:].view(values.dtype)
    assert not unaligned.flags.aligned
    assert not unaligned.flags.writeable
    expected, (packed, absmax, _) = quantize_4bit(values, dtype, "nf4"), quantize_4bit(unaligned, dtype, "nf4")
    assert same(packed, expected[0])
    assert same(absmax, expected[1])
    packed.flags.writeable = absmax.flags.writeable = False
    buffer = np.zeros(values.nbytes + 1, np.uint8)
    kernels.dequantize_4bit(packed, absmax, "nf4", 64, dtype, buffer[1:].view(values.dtype))
    assert same(buffer[1:].view(values.dtype).copy(), dequantize_4bit(packed, absmax, "nf4", 64, dtype, values.size))


def test_wrong_buffers_are_refused() -> None:
    values = random_values(128, "BF16")
    packed, absmax = np.empty(64, np.uint8), np.empty(2, np.float32)
    with pytest.raises(ValueError, match="absmax must be"):
        kernels.quantize_4bit(values, "BF16", "nf4", packed, np.empty(3, np.float32))
    with pytest.raises(ValueError, match="values must be"):
        kernels.quantize_4bit(values, "F32", "nf4", packed, absmax)
    with pytest.raises(ValueError, match="packed must be"):
        kernels.quantize_4bit(values, "BF16", "nf4", np.empty(128, np.uint8)[::2], absmax)
    with pytest.raises(ValueError, match="invalid block size"):
        kernels.dequantize_4bit(packed, absmax, "nf4", 100, "BF16", np.empty(128, np.uint16))
    with pytest.raises(ValueError, match="at least one row"):
        kernels.quantize_int8(np.empty((0, 4), np.uint16), "BF16", np.empty((0, 4), np.int8), np.empty(0, np.float32))


@each_dtype
@pytest.mark.parametrize("target", list(DTYPES))
@pytest.mark.parametrize("with_nan", [True, False])
def test_cast_is_that_of_torch(dtype: str, target: str, with_nan: bool, backend: str) -> None:
    if dtype == "F32":
        values = np.random.default_rng(7).integers(0, 2**32, 65536, np.uint32).view(np.float32)
    else:
        values = np.arange(65536, dtype=np.uint16)
    if not with_nan:
        values = values[~to_torch(values, dtype).isnan().numpy()]
    out = np.empty(values.size, np.float32 if target == "F32" else np.uint16)
    kernels.cast(values, dtype, target, out)
    assert same(out, to_numpy(to_torch(values, dtype).to(DTYPES[target])))


@each_dtype
def test_error_sums_measure_the_difference(dtype: str, backend: str) -> None:
    values = random_values(10_001, dtype)
    original = to_torch(values, dtype).double().numpy()
    other = (original + 1e-3 * np.arange(10_001) / 10_001).astype(np.float32)
    difference = other.astype(np.float64) - original
    squares, total, largest = kernels.error_sums(values, dtype, other)
    assert squares == pytest.approx((difference**2).sum(), rel=1e-12)
    assert total == pytest.approx((original**2).sum(), rel=1e-12)
    assert largest == np.abs(difference).max()


@each_dtype
def test_error_sums_take_both_sides_in_the_same_dtype(dtype: str, backend: str) -> None:
    one, other = random_values(10_001, dtype), random_values(10_001, dtype)[::-1].copy()
    squares, total, largest = kernels.error_sums(one, dtype, other, dtype)
    original = to_torch(one, dtype).double()
    difference = to_torch(other, dtype).double() - original
    assert squares == pytest.approx(float(difference.square().sum()), rel=1e-12)
    assert total == pytest.approx(float(original.square().sum()), rel=1e-12)
    assert largest == float(difference.abs().max())
    other[7] = to_numpy(torch.tensor([float("nan")], dtype=DTYPES[dtype]))[0]
    assert all(np.isnan(each) for each in kernels.error_sums(one, dtype, other, dtype)[::2])


def python(code: str, *, by: Sequence[str] = (sys.executable,), **environment: str) -> str:
    result = subprocess.run(
        [*by, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_the_kernels_need_no_torch_to_be_imported() -> None:
    code = (
        "import sys; from qz.quantize.compute import backends as b; print(b.backend().__name__, 'torch' in sys.modules)"
    )
    assert python(code) == "qz.quantize.compute.cpu.numba_kernels False"


WITHOUT_NUMBA = """
import os, sys
import torch  # once, for all that follow
for change in (
    "sys.modules['numba'] = None",
    "import numba; del numba.types.Array",  # as in another release, which must not stop a run
    "os.environ['QZ_KERNELS'] = 'torch'",
):
    if os.fork() == 0:
        exec(change)
        from qz.quantize.compute import backends
        print(backends.backend().__name__, *backends.notes(), sep=";", flush=True)
        os._exit(0)
    os.wait()
"""


def test_without_numba_torch_computes(python_with_libraries: list[str]) -> None:
    said = python(WITHOUT_NUMBA, by=python_with_libraries)
    absent, moved, by_choice = (line.split(";") for line in said.splitlines())
    assert {absent[0], moved[0], by_choice[0]} == {"qz.quantize.compute.gpu.torch_kernels"}
    assert "numba does not work here" in " ".join(moved[1:])


on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names a CPU of this kind")

DIGEST = """
import hashlib, sys
import numpy as np
from qz.quantize.compute import kernels

random = np.random.default_rng(0)
digest = hashlib.sha256()
for dtype, kinds in {values!r}.items():
    values = random.standard_normal(64 * 300 + 21).astype(np.float32)
    if dtype != "F32":
        wide, values = values, np.empty(values.size, np.uint16)
        kernels.cast(wide, "F32", dtype, values)
    for quant_type in ("nf4", "fp4") if "4-bit" in kinds else ():
        packed, absmax = np.empty(-(-values.size // 2), np.uint8), np.empty(301, np.float32)
        kernels.quantize_4bit(values, dtype, quant_type, packed, absmax)
        back = np.empty_like(values)
        kernels.dequantize_4bit(packed, absmax, quant_type, 64, dtype, back)
        for array in (packed, absmax, back, *kernels.quantize_absmax(absmax)[:2]):
            digest.update(array.tobytes())
    if "int8" not in kinds:
        continue
    rows = np.ascontiguousarray(values[: 97 * 130].reshape(97, 130))
    weight, scb = np.empty(rows.shape, np.int8), np.empty(97, np.float32)
    kernels.quantize_int8(rows, dtype, weight, scb)
    back = np.empty_like(rows)
    kernels.dequantize_int8(weight, scb, dtype, back)
    for array in (weight, scb, back):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


EVERY_KERNEL = dict.fromkeys(("BF16", "F16", "F32"), ("4-bit", "int8"))
EACH_KIND = {"BF16": ("4-bit",), "F16": ("int8",), "F32": ("4-bit",)}
"""Kinds of kernels by dtype: each is compiled for the older CPU, which takes a second."""


@on_x86_64
@pytest.mark.parametrize(
    ("cpu", "features", "values"),
    [
        ("x86-64", "", EACH_KIND),  # nothing beyond SSE2
        pytest.param("x86-64", "", EVERY_KERNEL, marks=pytest.mark.soak),
        # AVX2; with `make test CPU=portable` all tests are of it
        pytest.param("haswell", portable_cpu.ENVIRONMENT["NUMBA_CPU_FEATURES"], EVERY_KERNEL, marks=pytest.mark.soak),
    ],
    ids=["x86-64", "x86-64-all", "haswell-all"],
)
def test_code_for_older_cpus_gives_the_same_bytes(
    cpu: str,
    features: str,
    values: dict[str, tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    python_with_torch: list[str],
) -> None:
    """Against torch's code."""
    code = DIGEST.format(values=values)
    use("torch", monkeypatch)
    with contextlib.redirect_stdout(io.StringIO()) as told:
        exec(code, {})
    said = python(code, by=python_with_torch, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    assert said == told.getvalue().strip()


class Forks:
    """A Python that has imported numba, and runs programs that print one line in forks: numba alone takes longer to
    get ready than a small kernel to be compiled. ``prepared``: with what numba makes at its first compilation, which is
    for one CPU."""

    def __init__(self, *, prepared: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS, str(int(prepared))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, **environment: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([code, environment]) + "\n")
        self._process.stdin.flush()
        said, _, status = self._process.stdout.readline().rpartition(" ")
        assert status == "0\n"
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


FORKS = """
import json, os, sys
import numba
if sys.argv[1] == "1":
    numba.njit("void(float32[::1])")(lambda values: None)
for line in sys.stdin:
    code, environment = json.loads(line)
    if os.fork() == 0:
        status = 1
        try:
            os.environ.update(environment)
            numba.config.reload_config()
            exec(code)
            sys.stdout.flush()
            status = 0
        finally:
            os._exit(status)
    print("", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def prepared_forks() -> Iterator[Forks]:
    with Forks(prepared=True) as forks:
        yield forks


SMALL = """
import numpy as np
from qz.quantize.compute.cpu import numba_kernels
numba_kernels.dequantize_int8(np.zeros((1, 1), np.int8), np.zeros(1, np.float32), "F32", np.empty((1, 1), np.float32))
print(numba_kernels.__file__, end="")
"""


@on_x86_64
def test_code_cached_for_one_cpu_is_not_run_on_another(tmp_path: Path) -> None:
    with Forks(prepared=False) as forks:
        for made, cpu in ((1, "x86-64"), (1, "x86-64"), (2, "haswell")):
            forks.run(SMALL, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="")
            assert len(list(tmp_path.rglob("*dequantize_int8_f32*.nbc"))) == made


ENCODE = """
import numpy as np
from qz.quantize.compute import kernels
values, packed = np.linspace(-3, 3, 64, dtype=np.float32), np.empty(32, np.uint8)
kernels.encode_4bit(values, "F32", {quant_type!r}, np.full(1, 3, np.float32), packed)
print(packed.tobytes().hex(), end="")
"""


def test_code_of_a_quant_type_is_found_by_the_next_process_and_is_not_anothers(
    prepared_forks: Forks, tmp_path: Path
) -> None:
    values, packed = np.linspace(-3, 3, 64, dtype=np.float32), np.empty(32, np.uint8)
    runs: list[tuple[int, Literal["nf4", "fp4"]]] = [(1, "nf4"), (1, "nf4"), (2, "fp4")]
    for made, quant_type in runs:
        kernels.encode_4bit(values, "F32", quant_type, np.full(1, 3, np.float32), packed)
        found = prepared_forks.run(ENCODE.format(quant_type=quant_type), NUMBA_CACHE_DIR=str(tmp_path))
        assert found == packed.tobytes().hex()
        assert len(list(tmp_path.rglob("*encode*.nbc"))) == made


def test_code_is_compiled_anew_when_any_source_of_the_kernels_changed(prepared_forks: Forks, tmp_path: Path) -> None:
    """In a copy of the package, where a file's age says nothing."""
    shutil.copytree(Path(qz.__file__).parent, tmp_path / "qz", ignore=shutil.ignore_patterns("__pycache__"))
    compute, made = tmp_path / "qz/quantize/compute", 0
    for changed in ("", "", "cpu/llvm_vectors.py", "tables.py"):
        if changed:
            source = compute / changed
            times = source.stat().st_atime_ns, source.stat().st_mtime_ns
            source.write_text(source.read_text() + "# changed\n")
            os.utime(source, ns=times)
        there = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        where = prepared_forks.run(there + SMALL, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert where == str(compute / "cpu/numba_kernels.py")
        found = len(list((tmp_path / "cache").rglob("*dequantize_int8_f32*.nbc")))
        assert found - made == (0 if made and not changed else 1), changed
        made = found
