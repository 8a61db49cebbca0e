"""Searched scales on a GPU: the bits that the CPU finds, for every kind of block, in pieces of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converted import quantized
from qz.quantize.compute import kernels, scale_search, tables
from qz.quantize.compute.devices import arithmetic_on
from qz.quantize.compute.gpu import cuda_kernels
from qz.quantize.compute.gpu.gpu_arithmetic import Accelerator
from qz.quantize.importance.statistics import InputSums, write_statistics
from reference import dequantized_by_bitsandbytes, differing_tensors, tensors_of
from test_kernels import Array, QuantType, each_dtype, each_quant_type, random_values
from test_scale_search import COLUMNS, importance, rare_values, searched
from zoo import build


def on_gpu(values: Array, dtype: str, quant_type: QuantType, weights: Array | None, chunk: int) -> tuple[Array, Array]:
    arithmetic = Accelerator([torch.device("cuda", 0)], "cuda", chunk_bytes=chunk)
    packed, scales = np.empty(-(-values.size // 2), np.uint8), np.empty(-(-values.size // 64), np.float32)
    tiled = None if weights is None else scale_search.tiled_weights(weights)
    arithmetic.search_4bit(values, dtype, quant_type, tiled, 0, packed, scales)
    return packed, scales


@each_dtype
@each_quant_type
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_a_gpu_finds_what_the_cpu_finds(weighted: bool, quant_type: QuantType, dtype: str) -> None:
    weights = importance() if weighted else None
    for values in (random_values(700 * COLUMNS + 1, dtype), rare_values(dtype)):
        packed, scales, _ = searched(values, dtype, quant_type, weights)
        for chunk in (1 << 25, 3000):
            theirs = on_gpu(values, dtype, quant_type, weights, chunk)
            normal = np.abs(scales) >= np.finfo(np.float32).tiny  # bitsandbytes' GPU operation flushes others to zero
            assert np.array_equal(theirs[1][normal], scales[normal])
            assert not theirs[1][~normal].any()
            counted = np.repeat(normal, 64)[: values.size]  # blocks of zeros have other codes on a GPU
            levels = tables.QUANT_MAPS[quant_type]
            mine = [np.stack([each >> 4, each & 15], 1).reshape(-1)[: values.size] for each in (theirs[0], packed)]
            assert np.array_equal(levels[mine[0]][counted], levels[mine[1]][counted])


@each_dtype
@each_quant_type
def test_codes_for_given_scales_are_the_cpus(quant_type: QuantType, dtype: str) -> None:
    values = random_values(64 * 900 + 5, dtype, 1.0)
    scales = np.random.default_rng(0).standard_normal(901).astype(np.float32)
    scales[[3, 7]] = [0, 1e-39]
    mine, theirs = np.empty(-(-values.size // 2), np.uint8), np.empty(-(-values.size // 2), np.uint8)
    kernels.encode_4bit(values, dtype, quant_type, scales, mine)
    arithmetic_on("cuda").encode_4bit(values, dtype, quant_type, scales, theirs)
    assert np.array_equal(mine, theirs)


def test_gptq_cancels_as_much_error_as_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 320, generator=generator)
    inputs = torch.randn(4000, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    hessian = (inputs.T @ inputs).numpy()
    packed, scales, _ = searched(weight.numpy().reshape(-1), "F32", "nf4")

    def output_error(codes: Array) -> float:
        out = np.empty(weight.numel(), np.float32)
        kernels.dequantize_4bit(codes, scales, "nf4", 64, "F32", out)
        return float((inputs @ (torch.from_numpy(out).view_as(weight) - weight).T).square().sum())

    errors = []
    for arithmetic in (arithmetic_on("cpu"), arithmetic_on("cuda")):
        codes = np.empty_like(packed)
        arithmetic.gptq_4bit(weight.numpy(), "F32", "nf4", scales, hessian.copy(), codes)
        errors.append(output_error(codes))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[1] < 0.8 * output_error(packed)


@each_dtype
@each_quant_type
def test_gptqs_own_kernel_finds_the_bits_of_eager_torch(
    quant_type: QuantType, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 333, generator=generator) * torch.rand(333, generator=generator)
    hessian = (inputs.T @ inputs).numpy()
    values = random_values(100 * 333, dtype, 1.0).reshape(100, 333)
    packed, scales, _ = searched(values.reshape(-1), dtype, quant_type)
    mine, eager = np.empty_like(packed), np.empty_like(packed)
    assert cuda_kernels.kernel("gptq", torch.device("cuda", 0)) is not None
    arithmetic_on("cuda").gptq_4bit(values, dtype, quant_type, scales, hessian, mine)
    monkeypatch.setattr(cuda_kernels, "kernel", lambda *_: None)
    arithmetic_on("cuda").gptq_4bit(values, dtype, quant_type, scales, hessian, eager)
    assert np.array_equal(mine, eager)


@pytest.mark.parametrize("method", ["nf4", "fp4", "nf4-double"])
def test_a_checkpoint_made_on_a_gpu_is_loaded_on_it_and_on_the_cpu(method: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    source = tmp_path / "source"
    build("llama-untied").save_pretrained(source)
    sums: dict[str, InputSums] = {}
    from converted import plan_of

    for seed, weight in enumerate(plan_of(source, method).quantized):
        squares = 10 ** np.random.default_rng(seed).uniform(-2, 2, weight.shape[1])
        sums[weight.name] = InputSums(squares.astype(np.float32), 64)
    write_statistics(tmp_path / "s.safetensors", sums, {})
    how: dict[str, Any] = {"scales": "search", "importance": tmp_path / "s.safetensors"}
    quantized(source, tmp_path / "gpu", method, device="cuda", **how)
    quantized(source, tmp_path / "cpu", method, **how)
    if method == "nf4":
        assert differing_tensors(tmp_path / "gpu", tmp_path / "cpu") == []
    weights = dequantized_by_bitsandbytes(tensors_of(tmp_path / "gpu"))
    for place in ("cpu", {"": 0}):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "gpu", device_map=place)
        from bitsandbytes.functional import dequantize_4bit

        for path, values in weights.items():
            module: Any = model.get_submodule(path.removesuffix(".weight"))
            assert torch.equal(dequantize_4bit(module.weight.data, module.weight.quant_state).cpu(), values)
        with torch.no_grad():
            assert torch.isfinite(model(torch.arange(12, device=model.device).view(2, 6)).logits).all()
