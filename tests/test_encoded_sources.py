"""Sources of compressed-tensors, gpt-oss, GPTQ and AWQ: qz computes the values that their own libraries compute."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converted import dequantized, quantized
from encoded import State, awq, compressed, gptq, linears, rewritten, said_by_compressed_tensors
from qz import MalformedInput, Unsupported
from qz.formats.patterns import is_simple
from qz.quantize.inspection.report import Inspection
from reference import differing_files, differing_tensors, tensors_of, transformers_model


def differing(ours: Path, theirs: State, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    found = tensors_of(ours)
    assert found.keys() == theirs.keys()
    return [name for name, mine in found.items() if not mine.equal(theirs[name].to(dtype))]


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16 groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "W4A16 groups, zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "W4A16 rows, zero points": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "W8A16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "W3A16": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": False}),
    "W8A8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "W8A8 zero points": ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
    "FP8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "FP8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [40, 48]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_compressed_tensors(plain_llama: Path, tmp_path: Path, name: str) -> None:
    form, weights = FORMS[name]
    expected: State = {}
    said = said_by_compressed_tensors(form, {key: value for key, value in weights.items() if key != "scale_dtype"})
    source = rewritten(
        plain_llama, tmp_path / "source", lambda state: expected.update(compressed(state, form, weights)), said
    )
    for dtype in ("auto", "float32"):
        output = tmp_path / f"output-{dtype}"
        summary = dequantized(source, output, dtype=dtype, chunk_bytes=5000)
        assert differing(output, expected, torch.bfloat16 if dtype == "auto" else torch.float32) == []
        assert summary.method == "compressed-tensors"
        assert "quantization_config" not in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize("name", ["W4A16 groups, zero points", "FP8 rows"])
def test_compressed_tensors_as_transformers_loads_them(plain_llama: Path, tmp_path: Path, name: str) -> None:
    from transformers import CompressedTensorsConfig, LlamaForCausalLM

    form, weights = FORMS[name]
    said = said_by_compressed_tensors(form, weights)
    source = rewritten(plain_llama, tmp_path / "source", lambda state: compressed(state, form, weights), said)
    theirs = LlamaForCausalLM.from_pretrained(source, quantization_config=CompressedTensorsConfig(dequantize=True))
    dequantized(source, tmp_path / "output")
    assert differing(tmp_path / "output", theirs.state_dict()) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}}, "rotated inputs"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "the format 'sparse-24-bitmask'"),
    ],
)
def test_weights_of_another_basis_or_with_gaps_are_refused(
    plain_llama: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    form, weights = FORMS["W8A16"]
    said = {**said_by_compressed_tensors(form, weights), **more}
    source = rewritten(plain_llama, tmp_path / "source", lambda state: compressed(state, form, weights), said)
    with pytest.raises(Unsupported, match=words):
        dequantized(source, tmp_path / "output")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose experts hold random codes; every code and exponents of a wide range occur."""
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path_factory.mktemp("gpt-oss") / "source"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 100}
    sizes |= {"max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads)).bfloat16().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return folder


@pytest.mark.parametrize(
    "pattern", [r".*lm_head", r"model\.layers\.\d+\.mlp.*", r".*(q|k|v)_proj$", r"a*a*b", r"[a-z.]+\d?"]
)
def test_patterns_that_are_matched_need_the_square_of_a_name_at_most(pattern: str) -> None:
    assert is_simple(pattern)
    assert re.match(pattern, "a" * 2000) is None or pattern.startswith("[")  # within the test's time


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "a*a*a*b", ".*.*.*b.*", "a{0,9}" * 3 + "b", "a" * 501])
def test_patterns_that_may_take_for_ever_are_not_matched(pattern: str) -> None:
    assert not is_simple(pattern)


def test_the_experts_of_gpt_oss(gpt_oss: Path, tmp_path: Path) -> None:
    from transformers import GptOssForCausalLM, Mxfp4Config

    theirs = GptOssForCausalLM.from_pretrained(gpt_oss, quantization_config=Mxfp4Config(dequantize=True))
    summary = dequantized(gpt_oss, tmp_path / "output", chunk_bytes=10_000)
    assert differing(tmp_path / "output", theirs.state_dict()) == []
    assert summary.method == "mxfp4"

    theirs = transformers_model(GptOssForCausalLM, tmp_path / "output", "nf4")
    theirs.save_pretrained(tmp_path / "reference")
    quantized(gpt_oss, tmp_path / "nf4", "nf4")
    assert differing_files(tmp_path / "reference", tmp_path / "nf4") == []

    quantized(gpt_oss, tmp_path / "direct", "nf4", experts=True)
    quantized(tmp_path / "output", tmp_path / "by-way-of-bf16", "nf4", experts=True)
    assert differing_tensors(tmp_path / "direct", tmp_path / "by-way-of-bf16") == []


@pytest.mark.parametrize("order", [False, True], ids=["in order", "desc_act"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(plain_llama: Path, tmp_path: Path, bits: int, version: str, order: bool) -> None:
    expected: State = {}

    def change(state: State) -> None:
        expected.update(gptq(state, bits, 32, version, order))

    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order, "checkpoint_format": version}
    source = rewritten(plain_llama, tmp_path / "source", change, said)
    summary = dequantized(source, tmp_path / "output", chunk_bytes=5000)
    assert differing(tmp_path / "output", expected) == []
    assert summary.method == "gptq"


def test_layers_of_gptq_may_have_bits_of_their_own(plain_llama: Path, tmp_path: Path) -> None:
    expected: State = {}

    def change(state: State) -> None:
        inner = {name: state.pop(name) for name in list(state) if ".mlp." in name}
        expected.update(gptq(inner, 8, 32) | gptq(state, 4, 32))
        state |= inner

    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:.*mlp.*": {"bits": 8}}}
    source = rewritten(plain_llama, tmp_path / "source", change, said)
    dequantized(source, tmp_path / "output", chunk_bytes=5000)
    assert differing(tmp_path / "output", expected) == []


def test_awq(plain_llama: Path, tmp_path: Path) -> None:
    expected: State = {}
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    source = rewritten(plain_llama, tmp_path / "source", lambda state: expected.update(awq(state, 32)), said)
    dequantized(source, tmp_path / "output", chunk_bytes=5000)
    assert differing(tmp_path / "output", expected) == []


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("g_idx", 2, "names a group that is not there"),
        ("g_idx", -1, "names a group that is not there"),
        ("scales", float("nan"), "a scale that is NaN or infinite"),
    ],
)
def test_contents_that_make_no_sense_are_refused(
    plain_llama: Path, tmp_path: Path, part: str, value: float, match: str
) -> None:
    def change(state: State) -> None:
        gptq(state, 4, 32)
        state[f"model.layers.1.self_attn.q_proj.{part}"].view(-1)[5] = value

    source = rewritten(plain_llama, tmp_path / "source", change, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(MalformedInput, match=match):
        quantized(source, tmp_path / "output", "nf4")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_quantizing_gptq_is_quantizing_what_it_stands_for(plain_llama: Path, tmp_path: Path, method: str) -> None:
    from transformers import LlamaForCausalLM

    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    source = rewritten(plain_llama, tmp_path / "source", lambda state: gptq(state, 4, 32, order=True), said)
    dequantized(source, tmp_path / "between")
    transformers_model(LlamaForCausalLM, tmp_path / "between", method).save_pretrained(tmp_path / "reference")
    quantized(source, tmp_path / "output", method)
    assert differing_files(tmp_path / "reference", tmp_path / "output") == []


def test_inspect_names_every_form(plain_llama: Path, gpt_oss: Path, tmp_path: Path) -> None:
    from qz.api import inspect

    form, weights = FORMS["W4A16 groups"]
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    sources = {
        "compressed-tensors": rewritten(
            plain_llama,
            tmp_path / "ct",
            lambda state: compressed(state, form, weights),
            said_by_compressed_tensors(form, weights),
        ),
        "gptq": rewritten(plain_llama, tmp_path / "gptq", lambda state: gptq(state, 4, 32), said),
    }
    original = inspect(plain_llama)
    assert isinstance(original, Inspection)
    for method, source in sources.items():
        found = inspect(source)
        assert isinstance(found, Inspection)
        assert found.quantization is not None
        assert (found.quantization.method, found.problems) == (method, ())
        assert found.quantization.quantized_parameters == sum(
            tensors_of(plain_llama)[name].numel() for name in linears(tensors_of(plain_llama))
        )
        assert (found.parameters, found.estimates is not None) == (original.parameters, True)
    found = inspect(gpt_oss)
    assert isinstance(found, Inspection)
    assert found.quantization is not None
    assert (found.quantization.method, found.quantization.quantized_tensors) == ("mxfp4", 4)
