"""Sources in 8-bit floats, in every naming of their scales: qz computes the values that their own libraries compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converted import dequantized, plan_of, quantized
from encoded import State, fp8_blocks, fp8_scaled, linears, rewritten
from qz import MalformedInput, Unsupported
from qz.quantize.inspection.report import Inspection
from reference import differing_files, tensors_of, transformers_model

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "dequantize": True}


def differing(ours: Path, theirs: State) -> list[str]:
    found = tensors_of(ours)
    assert found.keys() == theirs.keys()
    return [
        name for name in found if found[name].dtype != theirs[name].dtype or not torch.equal(found[name], theirs[name])
    ]


def by_formula(folder: Path, scale_of: str, dtype: torch.dtype = torch.bfloat16) -> State:
    """The plain state: float32 codes times float32 scales, rounded once."""
    state = load_file(folder / "model.safetensors")
    for name in linears(state):
        scale = state.pop(name.removesuffix("weight") + scale_of).float()
        state[name] = (state[name].float() * scale).to(dtype)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_blocks_are_what_transformers_loads(plain_llama: Path, tmp_path: Path, dtype: str, scale_fmt: str) -> None:
    from transformers import LlamaForCausalLM

    said = {**FP8, "weight_block_size": [32, 64], "scale_fmt": scale_fmt}
    source = rewritten(plain_llama, tmp_path / "fp8", lambda state: fp8_blocks(state, (32, 64), scale_fmt), said)
    theirs = LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    expected = theirs.state_dict()
    if dtype != "auto":  # the library leaves what was not quantized in the dtype of the checkpoint
        expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()}
    assert type(theirs.model.layers[0].mlp.up_proj) is torch.nn.Linear

    summary = dequantized(source, tmp_path / "output", dtype=dtype, chunk_bytes=5000)
    assert differing(tmp_path / "output", expected) == []
    assert summary.method == "fp8"
    assert "quantization_config" not in json.loads((tmp_path / "output/config.json").read_text())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_quantizing_fp8_is_quantizing_what_it_stands_for(plain_llama: Path, tmp_path: Path, method: str) -> None:
    source = rewritten(
        plain_llama, tmp_path / "fp8", lambda s: fp8_blocks(s, (32, 32)), {**FP8, "weight_block_size": [32, 32]}
    )
    from transformers import LlamaForCausalLM

    dequantized(source, tmp_path / "between")
    theirs = transformers_model(LlamaForCausalLM, tmp_path / "between", method)
    theirs.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", method)
    assert differing_files(tmp_path / "reference", tmp_path / "output") == []
    assert summary.quantized_tensors == len(linears(tensors_of(plain_llama)))
    assert any("quantized already, with fp8" in note for note in summary.notes)


def test_blocks_are_cut_off_at_ragged_edges(plain_llama: Path, tmp_path: Path) -> None:
    """Where transformers refuses, or stretches the blocks over the whole matrix, DeepSeek's own code cuts them off."""
    block = (48, 40)

    def change(state: State) -> None:
        for name in linears(state):
            weight = state[name].float()
            grid = [-(-extent // size) for extent, size in zip(weight.shape, block, strict=True)]
            scale = torch.rand(grid) + 0.5
            state[name] = weight.to(torch.float8_e4m3fn)
            state[name + "_scale_inv"] = scale

    source = rewritten(plain_llama, tmp_path / "fp8", change, {**FP8, "weight_block_size": list(block)})
    state = load_file(source / "model.safetensors")
    for name in linears(state):
        if name.endswith("_scale_inv"):
            continue
        weight = state[name].float()
        spread = state.pop(name + "_scale_inv").repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        state[name] = (weight * spread[: weight.shape[0], : weight.shape[1]]).bfloat16()
    dequantized(source, tmp_path / "output", chunk_bytes=3000)
    assert differing(tmp_path / "output", state) == []


@pytest.mark.parametrize(
    ("suffix", "per_row", "dtype", "shape", "said"),
    [
        ("weight_scale", True, torch.float8_e4m3fn, (), {"quant_method": "fbgemm_fp8"}),
        ("weight_scale", False, torch.float8_e4m3fn, (), {"quant_method": "modelopt", "quant_algo": "FP8"}),
        ("weight_scale_inv", False, torch.float8_e4m3fn, (1,), {"quant_method": "fp8"}),
        ("scale_weight", False, torch.float8_e4m3fn, (), None),
        ("scale_weight", False, torch.float8_e5m2, (1,), None),
        ("scale_weight", True, torch.float8_e4m3fn, (), None),
        ("qscale_weight", False, torch.float8_e4m3fn, (), {"quant_method": "fp8"}),
        ("scale", False, torch.float8_e4m3fn, (1, 1), {"quant_method": "fp8"}),
    ],
)
def test_scales_of_a_weight_or_of_its_rows(
    plain_llama: Path,
    tmp_path: Path,
    suffix: str,
    per_row: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    said: object,
) -> None:
    def change(state: State) -> None:
        fp8_scaled(state, suffix, per_row, dtype, shape)
        state["scaled_fp8"] = torch.zeros(2, dtype=dtype)
        state["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(())

    source = rewritten(plain_llama, tmp_path / "fp8", change, said)  # type: ignore[arg-type]
    summary = dequantized(source, tmp_path / "output")
    theirs = by_formula(source, suffix)
    del theirs["scaled_fp8"], theirs["model.layers.0.mlp.up_proj.input_scale"]
    assert differing(tmp_path / "output", theirs) == []
    assert any("2 tensors left out" in note and "scaled_fp8" in note for note in summary.notes)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_without_any_scale_are_values(plain_llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def change(state: State) -> None:
        state |= {name: state[name].to(dtype) for name in state}

    source = rewritten(plain_llama, tmp_path / "fp8", change)
    theirs = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    dequantized(source, tmp_path / "output")
    assert differing(tmp_path / "output", theirs) == []


def test_every_code_has_torchs_value() -> None:
    from qz.quantize.decoding.codes import table

    codes = torch.arange(256, dtype=torch.uint8)
    names = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    for name, dtype in names.items():
        theirs, ours = codes.view(dtype).float(), torch.from_numpy(table(name))
        assert torch.equal(theirs.nan_to_num(7e7), ours.nan_to_num(7e7)), name
        assert torch.equal(theirs.signbit()[~theirs.isnan()], ours.signbit()[~ours.isnan()]), name


def test_a_weight_without_its_scale_is_refused(plain_llama: Path, tmp_path: Path) -> None:
    def change(state: State) -> None:
        fp8_blocks(state, (32, 32))
        del state["model.layers.1.mlp.up_proj.weight_scale_inv"]

    source = rewritten(plain_llama, tmp_path / "fp8", change, {**FP8, "weight_block_size": [32, 32]})
    with pytest.raises(MalformedInput, match=r"layers.1.mlp.up_proj.weight.*has no scale"):
        plan_of(source, "nf4")


def test_weights_that_need_scaled_inputs_are_refused(plain_llama: Path, tmp_path: Path) -> None:
    def change(state: State) -> None:
        fp8_blocks(state, (32, 32))
        state["model.layers.1.mlp.down_proj.pre_quant_scale"] = torch.full((192,), 2.0)

    source = rewritten(plain_llama, tmp_path / "fp8", change, {"quant_method": "modelopt"})
    with pytest.raises(Unsupported, match=r"down_proj.pre_quant_scale.*weights of scaled inputs"):
        plan_of(source, "nf4")


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (torch.ones(3, 5), "does not fit its weight of shape"),
        (torch.full((4, 2), float("nan")), "NaN or infinite"),
        (torch.full((4, 2), float("inf")), "NaN or infinite"),
        (torch.ones(0, 2), "does not fit its weight"),
    ],
)
def test_damaged_scales_are_refused(plain_llama: Path, tmp_path: Path, scale: torch.Tensor, match: str) -> None:
    def change(state: State) -> None:
        fp8_blocks(state, (16, 32))
        state["model.layers.0.self_attn.q_proj.weight_scale_inv"] = scale

    source = rewritten(plain_llama, tmp_path / "fp8", change, {**FP8, "weight_block_size": [16, 32]})
    with pytest.raises(MalformedInput, match=match):
        quantized(source, tmp_path / "output", "nf4")
    assert not (tmp_path / "output").exists()


def test_codes_that_are_not_numbers_are_refused_like_any_other(plain_llama: Path, tmp_path: Path) -> None:
    def change(state: State) -> None:
        fp8_blocks(state, (32, 32))
        state["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = 0x7F

    source = rewritten(plain_llama, tmp_path / "fp8", change, {**FP8, "weight_block_size": [32, 32]})
    with pytest.raises(MalformedInput, match=r"contains 1 NaN or infinite value, first at \[3, 5\]"):
        quantized(source, tmp_path / "output", "nf4")


def test_inspect_names_the_form_and_gives_true_sizes(plain_llama: Path, tmp_path: Path) -> None:
    from qz.api import inspect

    said = {**FP8, "weight_block_size": [32, 32]}
    source = rewritten(plain_llama, tmp_path / "fp8", lambda state: fp8_blocks(state, (32, 32)), said)
    found, original = inspect(source), inspect(plain_llama)
    assert isinstance(found, Inspection)
    assert isinstance(original, Inspection)
    assert found.problems == ()
    assert found.quantization is not None
    assert (found.quantization.method, found.quantization.quantized_tensors) == ("fp8", 14)
    assert found.parameters == original.parameters
    assert found.estimates == original.estimates
    stored = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    assert found.memory_footprint == stored
    planned = inspect(source, plan=True)
    assert isinstance(planned, Inspection)
    summary = quantized(source, tmp_path / "output", "nf4")
    assert planned.estimates is not None
    assert planned.estimates["nf4"].bytes == sum(shard.bytes for shard in summary.shards)
