"""Repositories with a model in a form that neither library loads: told for what they are, with what to get instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Qz
from qz import MalformedInput, MissingInput, QzError, Unsupported
from qz.formats.checkpoint.quantization.left_over import left_over
from qz.formats.checkpoint.quantization.quantization_config import stated_quantization
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.formats.source import opened
from qz.formats.tensors.decoded import StoredTensor
from qz.formats.tensors.weight_names import PICKLE

LLAMA = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
MADE_FROM = "Use the model that this was made from, with its weights in safetensors."
ANOTHER = "Use a repository of this model that has config.json and model.safetensors."
NOTHING = "there is nothing in it to quantize."


def refused(folder: Path, files: dict[str, str], error: type[QzError] = MissingInput) -> str:
    """What is said of a folder with these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(error) as raised:
        open_checkpoint(LocalFolder(folder))
    return str(raised.value)


@pytest.mark.parametrize(
    ("file", "form", "advice"),
    [
        ("onnx/model.onnx", "ONNX", MADE_FROM),
        ("model.onnx_data", "ONNX", MADE_FROM),
        ("openvino_model.bin", "OpenVINO", MADE_FROM),
        ("Model.mlpackage/Manifest.json", "Core ML", MADE_FROM),
        ("tf_model.h5", "TensorFlow", MADE_FROM),
        ("flax_model.msgpack", "Flax", MADE_FROM),
        ("model_state.pdparams", "PaddlePaddle", MADE_FROM),
        ("parakeet.nemo", "NeMo", MADE_FROM),
        ("model.tflite", "LiteRT", MADE_FROM),
        ("model.pte", "ExecuTorch", MADE_FROM),
        ("rank0.engine", "TensorRT", MADE_FROM),
        ("shared_vocabulary.json", "CTranslate2", MADE_FROM),
        ("original/consolidated.00.pth", "Llama's own layout", ANOTHER),
        ("0_StaticEmbedding/tokenizer.json", "a static embedding", "It has no layer to quantize."),
        ("learned_embeds.bin", "an embedding of textual inversion", NOTHING),
        ("ip-adapter-plus_sd15.bin", "an IP-Adapter", NOTHING),
    ],
)
def test_a_form_is_named_with_what_to_do(file: str, form: str, advice: str, tmp_path: Path) -> None:
    said = refused(tmp_path, {file: "x", "tokenizer_config.json": "{}"})
    assert "has no config.json" in said
    assert f"It holds {form}" in said
    assert said.endswith(advice)


def test_a_config_without_weights_is_told_with_the_forms_that_there_are(tmp_path: Path) -> None:
    said = refused(tmp_path, {"config.json": LLAMA, "onnx/model.onnx": "x", "openvino/openvino_model.bin": "x"})
    assert "has no model.safetensors, which transformers loads. It holds ONNX ('onnx/model.onnx')" in said
    assert "OpenVINO ('openvino/openvino_model.bin')" in said


def test_a_config_of_nobody_is_told_with_the_form_that_it_is_of(tmp_path: Path) -> None:
    said = refused(
        tmp_path, {"config.json": '{"lang_ids": []}', "vocabulary.json": "[]", "model.bin": "x"}, Unsupported
    )
    assert "neither transformers nor diffusers knows such a model. It holds CTranslate2" in said


def test_weights_without_a_config_are_named(tmp_path: Path) -> None:
    said = refused(tmp_path / "comfy", {"split_files/diffusion_models/wan.safetensors": "x"})
    assert "If 'split_files/diffusion_models/wan.safetensors' is a whole model of diffusers, name that file." in said
    assert "'RWKV.pth' alone does not say what model it is of" in refused(tmp_path / "pickle", {"RWKV.pth": "x"})


def test_models_in_folders_of_folders_and_in_gguf_are_named(tmp_path: Path) -> None:
    files = {
        "models/image_encoder/config.json": "{}",
        "models/image_encoder/model.safetensors": "x",
        "Q4_0/a.gguf": "x",
    }
    assert "there are models in it: Q4_0, models/image_encoder. Name one with --subfolder." in refused(tmp_path, files)


def test_of_the_modules_of_sentence_transformers_the_model_is_named(tmp_path: Path) -> None:
    files = {"modules.json": "[]", "0_Transformer/vocab.txt": "a"}
    for name in ("0_Transformer", "2_Dense"):
        files |= {f"{name}/config.json": "{}", f"{name}/model.safetensors": "x"}
    assert "there are models in it: 0_Transformer. Name one" in refused(tmp_path, files)


@pytest.mark.parametrize("keys", [("quantization",), ("quantization", "quantization_config")])
def test_what_mlx_packed_is_named_by_every_command(
    keys: tuple[str, ...], tiny_llama: Path, tmp_path: Path, forked_qz: Qz
) -> None:
    """Codes in whole 32-bit words, with a scale and a bias for each group of a row; the config names no method."""
    packed: dict[str, torch.Tensor] = {}
    for name, weight in load_file(tiny_llama / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            packed[name] = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.uint32)
            for part in ("scales", "biases"):
                packed[name.replace("weight", part)] = torch.ones(weight.shape[0], weight.shape[1] // 64).bfloat16()
        else:
            packed[name] = weight
    save_file(packed, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    config = json.loads((tiny_llama / "config.json").read_text())
    config |= {key: {"group_size": 64, "bits": 4} for key in keys}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in ("quantize", "dequantize"):
        refused = forked_qz(command, tmp_path)
        assert refused.returncode == 78
        assert re.search(r"quantized with '?mlx'?.* Start from the original", refused.stderr), refused.stderr
    assert "the model is quantized with 'mlx'" in forked_qz("inspect", tmp_path).stdout


def test_what_gptq_packed_before_configs_named_a_method_is_not_taken_for_mlx() -> None:
    stated = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    assert stated_quantization({"model_type": "llama", "quantization_config": stated}) == stated


def test_weights_of_openvino_and_whisper_cpp_are_no_pickles() -> None:
    assert not any(map(PICKLE.search, ("openvino_model.bin", "ggml-large.bin", "openvino_tokenizer.xml")))
    assert all(map(PICKLE.search, ("pytorch_model.bin", "openvino_model.pt", "Model.CKPT", "unet/diffusion.bin")))


@pytest.mark.parametrize(
    "name", ["config.json", "model_index.json", "model.safetensors.index.json", "README.md", "x.onnx"]
)
def test_a_file_that_is_none_of_weights_is_told_to_name_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"_class_name": "FluxPipeline"}')
    told = rf"{re.escape(name)} is no file of weights\. Name the folder of the model, such as {tmp_path}"
    with pytest.raises(MalformedInput, match=told), opened(str(tmp_path / name)):
        pass


PLAIN = {"q.weight": ("BF16", (8, 16)), "q.bias": ("F32", (8,)), "ids": ("I64", (1, 8)), "steps": ("I64", ())}
STATED = [{"quant_method": method} for method in ("torchao", "awq", "fp8", "quanto", "modelopt", "gguf", "nobody")] + [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
    {},
]


@pytest.mark.parametrize("stated", STATED, ids=str)
def test_a_config_of_any_method_over_plain_weights_is_left_over(stated: dict[str, Any]) -> None:
    tensors = {name: StoredTensor(name, dtype, shape, "", 0, 0) for name, (dtype, shape) in PLAIN.items()}
    assert left_over({"text_config": {"quantization_config": stated}}, tensors) == (
        stated.get("quant_method", "an unknown method"),
        "`text_config.quantization_config`",
    )


@pytest.mark.parametrize(
    ("method", "packed"),
    [
        ("torchao", {"q._weight_qdata": ("I8", (8, 16)), "q._weight_scale": ("F32", (8, 1))}),
        ("torchao", {"q._weight_qdata": ("F8_E4M3", (8, 16)), "q._weight_scale": ("F32", (8, 1))}),
        ("gptq", {"q.qweight": ("I32", (2, 8)), "q.scales": ("F16", (1, 8))}),
        ("quanto", {"q.weight._data": ("U8", (8, 8)), "q.weight._scale": ("BF16", (8, 1))}),
        ("compressed-tensors", {"q.compressed": ("BF16", (64,)), "q.bitmask": ("U8", (8, 2))}),
        ("spqr", {"q.dense_weights": ("I64", (128,)), "q.row_offsets": ("I32", (9,))}),
        ("bitsandbytes", {"q.weight": ("U8", (64, 1)), "q.weight.absmax": ("F32", (2,))}),
    ],
)  # fmt: skip
def test_what_a_method_packed_is_not_left_over(method: str, packed: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    held = PLAIN | packed
    tensors = {name: StoredTensor(name, dtype, shape, "", 0, 0) for name, (dtype, shape) in held.items()}
    assert left_over({"quantization_config": {"quant_method": method}}, tensors) is None


def test_a_model_that_is_quantized_whenever_it_runs_is_not_left_over() -> None:
    """BitNet's weights are stored in bfloat16, and its layers round them: without its config it is another model."""
    stated = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    assert left_over({"quantization_config": stated}, {}) is None
