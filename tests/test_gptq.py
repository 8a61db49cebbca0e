"""``--rounding gptq``: the textbook's codes for given scales, and less error in the layers' outputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converted import quantized
from forward import output_of
from qz import MalformedInput
from qz.quantize.compute import kernels, scale_search, tables
from qz.quantize.compute.gpu.gptq import DAMPING, SHRINKAGE
from qz.quantize.importance.hessian_reader import HessianPlace
from qz.quantize.importance.statistics import InputSums, write_hessians, write_statistics
from reference import config_of, dequantized_by_bitsandbytes, tensors_of
from zoo import build


def textbook(weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Column by column in float64, by the inverse Hessian itself (arXiv 2210.17323, equations 2 and 3)."""
    rows, columns = weight.shape
    diagonal = hessian.double().diagonal()
    shrunk = (1 - SHRINKAGE) * hessian.double() + SHRINKAGE * diagonal.diag()
    damped = shrunk + torch.eye(columns) * DAMPING * diagonal.mean()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    inverse = torch.linalg.inv(damped[order][:, order])
    left, found = weight.double()[:, order].clone(), torch.zeros(rows, columns, dtype=torch.float64)
    spread = scales.double().repeat_interleave(64)[: weight.numel()].view(rows, columns)[:, order]
    for i in range(columns):
        nearest = (left[:, i] / spread[:, i]).unsqueeze(1).sub(levels).abs().argmin(1)
        found[:, i] = levels[nearest] * spread[:, i]
        error = (left[:, i] - found[:, i]) / inverse[i, i]
        left[:, i:] -= error[:, None] * inverse[i, i:]
        inverse[i + 1 :, i + 1 :] -= inverse[i + 1 :, i : i + 1] * inverse[i : i + 1, i + 1 :] / inverse[i, i]
    unsorted = torch.empty_like(found)
    unsorted[:, order] = found
    return unsorted


def made(packed: Any, scales: Any, shape: tuple[int, int]) -> torch.Tensor:
    out = np.empty(shape[0] * shape[1], np.float32)
    kernels.dequantize_4bit(packed, scales, "nf4", 64, "F32", out)
    return torch.from_numpy(out).view(shape)


@pytest.mark.parametrize("bad", [math.nan, 1e9])
def test_a_hessian_that_is_none_is_refused(bad: float) -> None:
    hessian, packed, scales = np.eye(64, dtype=np.float32), np.empty(64, np.uint8), np.ones(2, np.float32)
    hessian[0, 1] = hessian[1, 0] = bad
    with pytest.raises(MalformedInput, match="not positive definite"):
        kernels.gptq_4bit(np.ones((2, 64), np.float32), "F32", "nf4", scales, hessian, packed)


@pytest.mark.parametrize("shape", [(40, 192), (33, 97), (5, 300)], ids=str)
def test_the_codes_are_the_textbooks(shape: tuple[int, int]) -> None:
    """Rows of any length: blocks that reach from one row into the next, and an odd number of values."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    mixing = torch.randn(shape[1], shape[1], generator=generator) * torch.rand(shape[1], generator=generator) ** 3
    inputs = torch.randn(2000, shape[1], generator=generator) @ mixing
    hessian = inputs.T @ inputs
    hessian[3] = hessian[:, 3] = 0  # an input that is always zero
    count = weight.numel()
    packed, scales = np.empty(-(-count // 2), np.uint8), np.empty(-(-count // 64), np.float32)
    weights = scale_search.tiled_weights((hessian.diagonal() / hessian.diagonal().mean() + 1e-3).numpy())
    kernels.search_4bit(weight.numpy().reshape(-1), "F32", "nf4", weights, 0, packed, scales)
    nearest = made(packed, scales, shape)
    codes = np.full_like(packed, 0xA5)
    kernels.gptq_4bit(weight.numpy(), "F32", "nf4", scales, hessian.numpy().copy(), codes)
    found = made(codes, scales, shape)
    levels = torch.from_numpy(np.sort(tables.QUANT_MAPS["nf4"])).double()
    expected = textbook(weight, hessian, torch.from_numpy(scales), levels)
    assert float((found - expected).abs().lt(1e-5).double().mean()) > 0.99  # float32 may decide a tie otherwise
    if count % 2:
        assert codes[-1] & 15 == 7

    def output_error(one: torch.Tensor) -> float:
        return float((inputs @ (one - weight).T).square().sum())

    assert output_error(found) < 0.75 * output_error(nearest)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A small Llama, statistics with Hessians of its inputs, and these inputs by weight."""
    folder = tmp_path_factory.mktemp("gptq")
    torch.manual_seed(0)
    model = build("llama-odd")
    model.save_pretrained(folder / "source")
    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            module.register_forward_pre_hook(
                lambda _, given, name=f"{path}.weight": seen.setdefault(name, []).append(
                    given[0].float().flatten(0, -2)
                )
            )
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            model(torch.randint(0, 100, (8, 32)))
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    hessians = {name: (each.T @ each).numpy() for name, each in inputs.items()}
    digest = write_hessians(folder / "hessians.safetensors", hessians)
    sums = {name: InputSums(each.diagonal().copy(), 1024) for name, each in hessians.items()}
    places = {name: HessianPlace("hessians.safetensors", f"{name}.hessian") for name in hessians}
    write_statistics(folder / "statistics.safetensors", sums, {}, places, {"hessians.safetensors": digest})
    return folder / "source", folder / "statistics.safetensors", inputs


@pytest.mark.parametrize("method", ["nf4", "fp4", "nf4-double"])
def test_the_layers_outputs_lose_less(
    calibrated: tuple[Path, Path, dict[str, torch.Tensor]], method: str, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    source, known, inputs = calibrated
    how: dict[str, Any] = {"scales": "search", "importance": known, "threads": 2}
    quantized(source, tmp_path / "nearest", method, **how)
    summary = quantized(source, tmp_path / "gptq", method, rounding="gptq", **how)
    assert summary.refinement["rounding"] == "gptq"
    assert any("1,024 tokens" in text and "16,384" in text for text in summary.warnings)
    assert any("kind of text" in text for text in summary.warnings)
    stored = tensors_of(source)

    def errors(output: Path) -> dict[str, float]:
        weights = dequantized_by_bitsandbytes(tensors_of(output))
        return {
            name: float((inputs[name] @ (weights[name].float() - stored[name].float()).T).square().sum())
            for name in inputs
        }

    nearest, better = errors(tmp_path / "nearest"), errors(tmp_path / "gptq")
    assert all(better[name] < nearest[name] for name in inputs)
    assert sum(better.values()) < 0.8 * sum(nearest.values())
    assert config_of(tmp_path / "nearest") == config_of(tmp_path / "gptq")
    kept = [
        {key: value for key, value in tensors_of(tmp_path / each).items() if "absmax" in key}
        for each in ("gptq", "nearest")
    ]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[1]), "scales are those of the weighted search"
    LlamaForCausalLM.from_pretrained(tmp_path / "gptq", device_map="cpu")


def test_a_model_of_it_runs_and_its_loss_is_told(
    calibrated: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    from commands import run
    from qz.cli.commands.quantize import quantize

    torch.manual_seed(0)
    source, known, _ = calibrated
    told = run(quantize, source, output=tmp_path / "out", importance=known, rounding="gptq", report=True)
    weights, stored = dequantized_by_bitsandbytes(tensors_of(tmp_path / "out")), tensors_of(source)
    error = sum(float((weights[name].double() - stored[name].double()).square().sum()) for name in weights)
    norm = sum(float(stored[name].double().square().sum()) for name in weights)
    assert told["loss"]["total"]["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-6)
    assert (told["scales"], told["rounding"]) == ("search", "gptq")
    plain = LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, values in weights.items():
            plain.get_parameter(name).copy_(values)
    assert torch.isfinite(output_of(plain)).all()


def test_weights_without_a_hessian_are_named_and_none_at_all_is_refused(
    calibrated: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    source, _, inputs = calibrated
    known, name = tmp_path / "some.safetensors", "model.layers.0.self_attn.q_proj.weight"
    sums = {each: InputSums(values.square().sum(0).numpy(), 20_000) for each, values in inputs.items()}
    write_statistics(known, sums, {})
    how: dict[str, Any] = {"scales": "search", "importance": known, "rounding": "gptq"}
    with pytest.raises(MalformedInput, match="contains no Hessians"):
        quantized(source, tmp_path / "out", "nf4", **how)
    digest = write_hessians(tmp_path / "one.safetensors", {name: (inputs[name].T @ inputs[name]).numpy()})
    place = HessianPlace("one.safetensors", f"{name}.hessian")
    write_statistics(known, sums, {}, {name: place}, {"one.safetensors": digest})
    summary = quantized(source, tmp_path / "out", "nf4", **how)
    assert any("no Hessian of 13 quantized weights" in text for text in summary.warnings)
    assert not any("tokens for some layers" in text for text in summary.warnings)
