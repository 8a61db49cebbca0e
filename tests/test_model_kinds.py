"""Models that need something of their own: what qz writes is what the library writes, or runs as the original does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

import qz.api
import zoo
from converted import dequantized, plan_of, quantized
from covering import in_turn
from hub_server import connected
from qz import MalformedInput, QzError, Unsupported
from qz.formats.checkpoint.survey import open_checkpoint
from qz.formats.files.local_folder import LocalFolder
from qz.quantize.libraries.architecture import LoadRequest, TensorSpec
from qz.quantize.libraries.examine import examine
from reference import config_of, differing_files, differing_tensors, diffusers_model, transformers_model

LANGUAGE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(model: Any, folder: Path) -> Path:
    """The model as bfloat16 in a folder."""
    model.bfloat16().save_pretrained(folder)
    return folder


def change(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; ``...`` takes one out."""
    config = config_of(folder) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def same_as_the_library(model_class: Any, source: Path, output: Path, method: str) -> Any:
    """Quantize by qz and by the library; every file is the same. Returns the library's model."""
    theirs = transformers_model(model_class, source, method)
    reference = output.with_name(output.name + "-reference")
    theirs.save_pretrained(reference)
    summary = quantized(source, output, method)
    assert differing_files(reference, output) == []
    assert summary.footprint_after == theirs.get_memory_footprint()
    return theirs


def gemma3n() -> Any:
    return transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(
            **LANGUAGE,
            head_dim=16,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=64,
            layer_types=["sliding_attention", "full_attention"],
            num_kv_shared_layers=0,
            laurel_rank=64,
            sliding_window=16,
            activation_sparsity_pattern=[0.0, 0.0],
            max_position_embeddings=64,
        )
    )


@pytest.mark.parametrize(("make", "method"), in_turn([gemma3n], ["nf4", "int8"]))
def test_a_tied_head_does_not_make_another_layer_the_last_one(make: Any, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    source = saved(model, tmp_path / "source")
    same_as_the_library(type(model), source, tmp_path / "output", method)


def siglip2() -> Any:
    return transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_patches=16,
            patch_size=8,
        )
    )


def mamba() -> Any:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=1, state_size=16, time_step_rank=64, **tokens
        )
    )


def longt5() -> Any:
    return transformers.LongT5EncoderModel(
        transformers.LongT5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=100)
    )


def xvector() -> Any:
    convolutions = {"conv_dim": (64, 64), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    tdnn = {"tdnn_dim": (64, 64), "tdnn_kernel": (2, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 64}
    return transformers.Wav2Vec2ForXVector(
        transformers.Wav2Vec2Config(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            classifier_proj_size=64,
            **convolutions,
            **tdnn,
        )
    )


IDS = torch.arange(12)[None] + 3
IMAGE = {
    "pixel_values": torch.rand(1, 16, 192).bfloat16() * 2 - 1,
    "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    "spatial_shapes": torch.tensor([[4, 4]]),
}
SOUND = {"input_values": torch.sin(torch.arange(2000) / 9)[None].bfloat16()}
READ_BY_OTHERS = {
    siglip2: (IMAGE, ["patch_embedding"]),
    mamba: ({"input_ids": IDS}, ["dt_proj"]),
    xvector: (SOUND, ["kernel"]),
    longt5: ({"input_ids": IDS}, ["wo"]),
}


@pytest.mark.parametrize(("make", "method"), in_turn(READ_BY_OTHERS, ["nf4", "int8"]))
def test_a_linear_whose_weight_other_code_reads_stays_as_it_is(make: Any, method: str, tmp_path: Path) -> None:
    inputs, keys = READ_BY_OTHERS[make]
    if make is longt5 and method == "int8":
        keys = []  # the class asks for int8 before it uses the dtype, and for no other
    torch.manual_seed(0)
    model = make().eval()
    source, output, reference = saved(model, tmp_path / "source"), tmp_path / "output", tmp_path / "reference"
    summary = quantized(source, output, method)
    listed = config_of(output)["quantization_config"]["llm_int8_skip_modules"]
    assert set(keys) <= set(listed or ())
    kept = [path for path, reason in summary.skipped.items() if reason.startswith("its weight is read by ")]
    assert {path.rpartition(".")[2] for path in kept} == set(keys)
    assert any("unquantized: its weight is read" in warning for warning in summary.warnings) == bool(keys)

    transformers_model(type(model), source, method, skips=listed).save_pretrained(reference)
    assert differing_files(reference, output) == []
    with torch.no_grad():
        ours = type(model).from_pretrained(output)(**inputs)[0].float()
        original = model(**inputs)[0].float()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), original.flatten(), dim=0) > 0.8


def test_without_default_skips_it_is_quantized_as_the_library_does(tmp_path: Path) -> None:
    source, output, reference = saved(siglip2(), tmp_path / "source"), tmp_path / "output", tmp_path / "reference"
    summary = quantized(source, output, "nf4", default_skips=False)
    assert (
        "patch_embedding is quantized, and the output may fail or be wrong: its weight is read by Siglip2V"
        in " ".join(summary.warnings)
    )
    listed = config_of(output)["quantization_config"]["llm_int8_skip_modules"]
    transformers_model(transformers.Siglip2VisionModel, source, "nf4", skips=listed).save_pretrained(reference)
    assert differing_files(reference, output) == []


def glmga() -> Any:
    """A model type that is served by the class of another one, which has a config of its own."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 8,
        "image_size": 32,
    }
    config = CONFIG_MAPPING["glmga"](
        text_config={**LANGUAGE, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 8, "out_hidden_size": 64},
    )
    return transformers.Glm46VForConditionalGeneration(config)


def test_a_type_served_by_another_familys_class_keeps_its_own_config(tmp_path: Path) -> None:
    source = saved(glmga(), tmp_path / "source")
    assert config_of(source)["architectures"] == ["Glm46VForConditionalGeneration"]
    same_as_the_library(transformers.AutoModelForImageTextToText, source, tmp_path / "output", "nf4")
    assert config_of(tmp_path / "output")["model_type"] == "glmga"


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE, **more))


@pytest.mark.parametrize(
    ("named", "taken"), [("LlamaXForCausalLM", "LlamaForCausalLM"), ("NewLlamaModel", "LlamaModel")]
)
def test_where_the_library_has_no_class_of_that_name_the_model_type_gives_one(
    named: str, taken: str, tmp_path: Path
) -> None:
    source = saved(llama(), tmp_path / "source")
    change(source, architectures=[named])
    summary = quantized(source, tmp_path / "output", "nf4")
    assert f"transformers has no class {named}; {taken} is its class for the model type llama" in summary.warnings
    assert config_of(tmp_path / "output")["architectures"] == [taken]
    change(source, architectures=[taken])
    quantized(source, tmp_path / "same", "nf4")
    assert differing_tensors(tmp_path / "same", tmp_path / "output") == []


def test_a_class_that_cannot_be_told_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    source = saved(llama(tie_word_embeddings=True), tmp_path / "source")  # the file has no head: two classes fit
    change(source, architectures=None)
    with pytest.raises(Unsupported, match=r'e.g. "architectures": \["LlamaForCausalLM"\]'):
        quantized(source, tmp_path / "output", "nf4")
    change(source, architectures=["LlamaForRegression"])
    with pytest.raises(Unsupported, match="has no class LlamaForRegression"):
        quantized(source, tmp_path / "output", "nf4")
    change(source, architectures=["A" * 10**6])
    with pytest.raises(Unsupported, match=r"has no class 'A{99}…', which") as found:
        quantized(source, tmp_path / "output", "nf4")
    assert len(str(found.value)) < 1000
    change(source, architectures=[f"A{number}" for number in range(10_000)])
    with pytest.raises(MalformedInput, match="names 10,000 classes"):
        quantized(source, tmp_path / "output", "nf4")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (["LlamaModel", "LlamaForCausalLM"], "`architectures` in config.json also names LlamaModel"),
        (["LlamaForSequenceClassification", "CLIPModel", "LlamaForCausalLM"], "also names LlamaForSequenceCl"),
        (["LlamaXForCausalLM", "LlamaForCausalLM"], None),
        ([], "the only class of its model type that fits"),
        (["LlamaConfig"], "the only class of its model type that fits: transformers has no class LlamaConfig"),
        ([3], "the only class of its model type that fits"),
        (..., "the only class of its model type that fits"),
    ],
)
def test_of_several_classes_or_none_the_one_that_the_weights_are_of_is_taken(
    named: Any, told: str | None, tmp_path: Path
) -> None:
    source = saved(llama(), tmp_path / "source")
    quantized(source, tmp_path / "wanted", "nf4")
    change(source, architectures=named)
    summary = quantized(source, tmp_path / "output", "nf4")
    assert differing_tensors(tmp_path / "wanted", tmp_path / "output") == []
    assert config_of(tmp_path / "wanted") == config_of(tmp_path / "output")
    taken = [warning for warning in summary.warnings if warning.startswith("taken as a LlamaForCausalLM, ")]
    assert len(taken) == (told is not None)
    assert told is None or told in taken[0]


@pytest.mark.parametrize(
    ("weights", "named", "model_type"),
    [("qwen2", "LlamaForCausalLM", "qwen2"), ("qwen2", "Qwen2ForCausalLM", "llama"), ("mistral", ..., "mistral")],
)
def test_where_class_and_model_type_are_of_two_families_the_weights_decide_and_else_the_type(
    weights: str, named: Any, model_type: str, tmp_path: Path
) -> None:
    """Biases tell Qwen2 from Llama. Nothing in the files tells Mistral from it: ``AutoModel`` goes by the type."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[weights](**LANGUAGE))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    source = saved(model, tmp_path / "source")
    same_as_the_library(transformers.AutoModelForCausalLM, source, tmp_path / "output", "nf4")
    change(source, architectures=["LlamaForCausalLM"] if named is ... else [named], model_type=model_type)
    summary = quantized(source, tmp_path / "again", "nf4")
    assert differing_tensors(tmp_path / "output", tmp_path / "again") == []
    assert config_of(tmp_path / "output") == config_of(tmp_path / "again")
    assert any(f"but the model type {model_type}" in warning for warning in summary.warnings)


def test_of_a_model_type_that_nobody_knows_no_class_is_asked_for(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path / "source")
    change(source, architectures=..., model_type="llama9")
    with pytest.raises(Unsupported, match=r"does not know the model type llama9, which .* pip install -U"):
        quantized(source, tmp_path / "output", "nf4")


@pytest.mark.parametrize("missing", ["pooler", "class"])
def test_the_advice_on_missing_weights_works(missing: str, python_with_libraries: list[str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, vocab_size=100)
    if missing == "pooler":
        source = saved(transformers.BertModel(config, add_pooling_layer=False), tmp_path / "source")
    else:
        source = saved(transformers.BertForMaskedLM(config), tmp_path / "source")
        change(source, architectures=["BertModel"])
    with pytest.raises(MalformedInput, match=r"does not fit BertModel: missing: pooler\.dense\.bias") as refused:
        quantized(source, tmp_path / "output", "nf4")
    if missing == "pooler":
        code = re.search(r'python -c "(.*)"', str(refused.value))
        assert code is not None
        subprocess.run([*python_with_libraries, "-c", code[1]], cwd=tmp_path, check=True, capture_output=True)
        source = tmp_path / "NEW"
    else:
        named = re.search(r'"architectures": \["(\w+)"\]', str(refused.value))
        assert named is not None
        change(source, architectures=[named[1]])
    quantized(source, tmp_path / "output", "nf4")


def test_a_config_of_timm_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    told = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "label_names": ["x"] * 10, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    save_file({"head.weight": torch.zeros(10, 192)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, _ = transformers.PreTrainedConfig.get_config_dict(tmp_path)
    with closing(LocalFolder(tmp_path)) as folder:
        assert open_checkpoint(folder).config["model_type"] == theirs["model_type"] == "timm_wrapper"
    with pytest.raises(
        QzError, match=r"requires the timm library.*\. Install that too" if find_spec("timm") is None else "TimmWrapper"
    ):
        quantized(tmp_path, tmp_path / "output", "nf4")


def test_weights_of_another_head_than_config_json_names_are_taken_for_what_they_are(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LANGUAGE, num_labels=3, pad_token_id=0)
    source = saved(transformers.LlamaForSequenceClassification(config), tmp_path / "source")
    change(source, architectures=["LlamaForCausalLM"])
    same_as_the_library(transformers.AutoModelForSequenceClassification, source, tmp_path / "output", "nf4")
    summary = quantized(source, tmp_path / "again", "nf4")
    assert any(text.startswith("taken as a LlamaForSequenceClassification, whose") for text in summary.warnings)


def test_where_no_class_is_named_the_refusal_begins_with_the_one_that_fits_best(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    source = saved(
        transformers.BertForPreTraining(transformers.BertConfig(**sizes, vocab_size=100)), tmp_path / "source"
    )
    weights = load_file(source / "model.safetensors")
    weights["bert.embeddings.position_ids"] = torch.arange(512).unsqueeze(0)  # as old versions stored
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    change(source, architectures=...)
    with pytest.raises(Unsupported, match=r'e.g. "architectures": \["BertForPreTraining"\]'):
        quantized(source, tmp_path / "output", "nf4")


@pytest.mark.parametrize(
    ("key", "left"),
    [
        ("quantization_config", {}),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("compression_config", {"format": "pack-quantized"}),
    ],
)
def test_a_config_that_outlived_its_quantization_is_told_as_such(key: str, left: Any, tmp_path: Path) -> None:
    source = saved(llama(), tmp_path / "source")
    change(source, **{key: left})
    with pytest.raises(Unsupported, match=f"but none of its weights is. .* remove `{key}` from it"):
        quantized(source, tmp_path / "output", "nf4")
    change(source, **{key: ...})
    quantized(source, tmp_path / "output", "nf4")


def test_what_an_index_does_not_say_of_its_shards_is_taken_from_them_as_the_library_does(tmp_path: Path) -> None:
    source = tmp_path / "source"
    llama().bfloat16().save_pretrained(source, max_shard_size="60KB")
    index = source / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    places = told["weight_map"]
    del places["model.norm.weight"]
    one, other = "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"
    places[one], places[other] = places[other], places[one]
    index.write_text(json.dumps(told))
    same_as_the_library(transformers.LlamaForCausalLM, source, tmp_path / "output", "nf4")
    notes = quantized(source, tmp_path / "again", "nf4").warnings
    assert any("does not say that" in text and "(and 2 more such)" in text for text in notes), notes


def test_shards_in_folders_that_an_index_names_are_read_where_the_library_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers; diffusers refuses such names, and so does qz for its models."""
    source = tmp_path / "source"
    llama().bfloat16().save_pretrained(source, max_shard_size="60KB")
    told = json.loads((source / "model.safetensors.index.json").read_text())
    (source / "a" / "b").mkdir(parents=True)
    for number, file in enumerate(sorted(set(told["weight_map"].values()))):
        place = ("{}", "a/{}", "a/b/{}")[number % 3].format(file)
        (source / file).rename(source / place)
        told["weight_map"] |= dict.fromkeys((key for key, value in told["weight_map"].items() if value == file), place)
    (source / "model.safetensors.index.json").write_text(json.dumps(told))
    same_as_the_library(transformers.LlamaForCausalLM, source, tmp_path / "output", "nf4")
    assert qz.api.inspect(source).problems == ()
    assert quantized(source, tmp_path / "report", "nf4").left_out == ()
    assert qz.api.verify(tmp_path / "report", against=source).intact
    with connected(monkeypatch, tmp_path / "hub") as hub:
        hub.add("org/it", {str(path.relative_to(source)): path for path in source.rglob("*.*")})
        for download in (False, True):
            qz.api.quantize("org/it", output=tmp_path / "far", if_exists="overwrite", download=download)
            assert differing_files(tmp_path / "output-reference", tmp_path / "far") == []
    outside = tmp_path / "outside"
    (source / "a").rename(outside)
    (source / "a").symlink_to(outside)
    with pytest.raises(MalformedInput, match="is not a folder inside"):
        qz.api.quantize(source, output=tmp_path / "none")


def test_numbers_that_json_has_not_are_read_as_older_versions_of_the_library_wrote_them(tmp_path: Path) -> None:
    """As in the configs of Nemotron-H and Mamba 2: ``"time_step_limit": [0.0, Infinity]``."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1}
    config = transformers.Mamba2Config(**sizes, vocab_size=64, chunk_size=8)
    source = saved(transformers.Mamba2ForCausalLM(config), tmp_path / "source")
    text, count = re.subn(r'\{\s*"__float__": "Infinity"\s*\}', "Infinity", (source / "config.json").read_text())
    assert count == 1
    (source / "config.json").write_text(text)
    (source / "generation_config.json").write_text('{"temperature": Infinity}')
    same_as_the_library(transformers.Mamba2ForCausalLM, source, tmp_path / "output", "nf4")
    assert qz.api.inspect(source, plan=True).problems == ()


def test_numbers_that_json_has_not_stay_in_a_config_as_diffusers_writes_them(tmp_path: Path) -> None:
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8, "patch_size": 1}
    heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    odd = {"norm_eps": float("inf"), "timestep_scale": float("nan")}
    model_class, source = diffusers.SanaTransformer2DModel, tmp_path / "source"
    model_class(**sizes, **heads, **odd, in_channels=4, out_channels=4, caption_channels=32).save_pretrained(source)
    assert re.search(r"Infinity.*NaN", (source / "config.json").read_text(), re.DOTALL)
    diffusers_model(model_class, source, "nf4").save_pretrained(tmp_path / "reference")
    quantized(source, tmp_path / "output", "nf4")
    assert differing_files(tmp_path / "reference", tmp_path / "output") == []


def test_a_part_of_a_config_that_outlived_its_quantization_is_told_with_its_place(tmp_path: Path) -> None:
    source = saved(glmga(), tmp_path / "source")
    config = config_of(source)
    config["text_config"]["quantization_config"] = config["vision_config"]["quantization_config"] = {"bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=r"but none of its weights is. .* remove `.*`") as refused:
        quantized(source, tmp_path / "output", "nf4")
    for keys in re.findall(r"`([\w.]+)`", str(refused.value)):
        part, _, key = keys.partition(".")
        del config[part][key]
    (source / "config.json").write_text(json.dumps(config))
    quantized(source, tmp_path / "output", "nf4")


@pytest.mark.parametrize("left", [[1], "bitsandbytes", 5])
def test_a_quantization_config_that_is_no_object_is_refused(left: Any, tmp_path: Path) -> None:
    source = saved(llama(), tmp_path / "source")
    change(source, quantization_config=left)
    with pytest.raises(MalformedInput, match="has a quantization_config that is not an object"):
        quantized(source, tmp_path / "output", "nf4")


def test_a_missing_output_layer_is_no_model_without_a_head(tmp_path: Path) -> None:
    source = saved(llama(tie_word_embeddings=False), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MalformedInput, match=r'lacks lm_head.weight, .* "tie_word_embeddings": true .* \["LlamaModel"\]'
    ):
        quantized(source, tmp_path / "output", "nf4")
    body = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(body, source / "model.safetensors", metadata={"format": "pt"})
    summary = quantized(source, tmp_path / "output", "nf4")
    assert "handled as a LlamaModel: the weights lack the head of LlamaForCausalLM" in summary.warnings


def test_what_lacks_more_than_a_head_is_told_to_lack_the_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=100))
    source = saved(masked, tmp_path / "source")  # without a pooler, which BertModel has
    change(source, architectures=["BertForTokenClassification"])
    with pytest.raises(MalformedInput, match=r"does not fit BertForTokenClassification: missing: classifier\.bias"):
        quantized(source, tmp_path / "output", "nf4")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_under_the_prefix_of_a_wrapper_are_told_as_such(prefix: str, tmp_path: Path) -> None:
    source = saved(llama(), tmp_path / "source")
    weights = {prefix + name: weight for name, weight in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MalformedInput, match=rf"All names in the files begin with '{prefix}'"):
        quantized(source, tmp_path / "output", "nf4")


def test_an_adapter_beside_a_model_is_told_of(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path / "source")
    assert not any("adapter" in warning for warning in quantized(source, tmp_path / "plain", "nf4").warnings)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somewhere"}')
    summary = quantized(source, tmp_path / "output", "nf4")
    assert any("adapter_config.json is not in the output" in warning for warning in summary.warnings)


def redux() -> Any:
    return diffusers.ReduxImageEncoder(redux_dim=64, txt_in_features=64)


def unclip() -> Any:
    return UnCLIPTextProjModel(
        clip_extra_context_tokens=2, clip_embeddings_dim=64, time_embed_dim=64, cross_attention_dim=64
    )


@pytest.mark.parametrize("make", [redux, unclip], ids=lambda make: make.__name__)
def test_classes_of_diffusers_are_found_wherever_it_keeps_them(make: Any, tmp_path: Path) -> None:
    source, output, reference = tmp_path / "source", tmp_path / "output", tmp_path / "reference"
    model = make()
    model.save_pretrained(source)
    quantized(source, output, "nf4")
    diffusers_model(type(model), source, "nf4", torch.float32).save_pretrained(reference)
    assert differing_tensors(reference, output) == []


def test_a_text_encoder_that_only_a_pipeline_of_diffusers_has_is_a_model_of_transformers(tmp_path: Path) -> None:
    """Kandinsky's, as Kolors' ChatGLM and the safety checkers: their classes are in diffusers, their kind is not."""
    config = MCLIPConfig(
        transformerDimSize=64, imageDimSize=64, vocab_size=64, hidden_size=64, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    source = saved(MultilingualCLIP(config), tmp_path / "source")
    change(source, auto_map={"AutoModel": "modeling.MultilingualCLIP"})
    theirs = transformers_model(MultilingualCLIP, source, "nf4")
    theirs.save_pretrained(tmp_path / "reference")
    summary = quantized(source, tmp_path / "output", "nf4")
    assert differing_tensors(tmp_path / "reference", tmp_path / "output") == []
    assert summary.footprint_after == theirs.get_memory_footprint()
    assert plan_of(source, "nf4").architecture.class_module == MultilingualCLIP.__module__
    assert type(qz.load(tmp_path / "output", device="cpu")) is MultilingualCLIP


class OddNames(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]
    """Layers whose names the library's loader takes for something else."""

    @diffusers.configuration_utils.register_to_config  # type: ignore[untyped-decorator]
    def __init__(self) -> None:
        super().__init__()
        self.to_bias = torch.nn.Linear(64, 64)
        self.weight_proj = torch.nn.Linear(64, 64)
        self.proj = torch.nn.Linear(64, 64)

    def forward(self, x: Any) -> Any:
        return self.proj(self.weight_proj(self.to_bias(x)))


@pytest.mark.parametrize(("method", "stays"), [("nf4", "to_bias"), ("int8", "weight_proj")])
def test_what_diffusers_could_not_load_back_stays_as_it_is(
    method: str, stays: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "OddNames", OddNames, raising=False)
    source, output = tmp_path / "source", tmp_path / "output"
    OddNames().save_pretrained(source)
    summary = quantized(source, output, method)
    assert summary.skipped == {stays: "diffusers could not load it back, for its name"}
    assert any(f"the linear layer {stays} stays unquantized: diffusers" in warning for warning in summary.warnings)
    assert config_of(output)["quantization_config"]["llm_int8_skip_modules"] == [stays]
    loaded = diffusers_model(OddNames, output, None, torch.float32)
    assert type(getattr(loaded, stays)) is torch.nn.Linear
    assert type(loaded.proj) is not torch.nn.Linear

    quantized(source, tmp_path / "all", method, default_skips=False)
    with pytest.raises((ValueError, KeyError)):
        diffusers_model(OddNames, tmp_path / "all", None, torch.float32)


def test_the_dtype_is_the_one_of_what_the_class_does_not_keep_in_float32(tmp_path: Path) -> None:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=4096,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=32,
    )
    source, reference = tmp_path / "source", tmp_path / "reference"
    model.save_pretrained(tmp_path / "float32")
    diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(source)
    summary = quantized(source, tmp_path / "output", "nf4")
    assert summary.dtype == "bfloat16"
    diffusers_model(diffusers.WanTransformer3DModel, source, "nf4", torch.bfloat16).save_pretrained(reference)
    assert differing_tensors(reference, tmp_path / "output") == []


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_checkpoint_in_float64_is_cast_to_the_dtype_of_its_config(method: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    llama().double().save_pretrained(source)
    with pytest.raises(Unsupported, match=r"stored as F64 and would have to be quantized.*--dtype"):
        quantized(source, tmp_path / "output", method)
    change(source, dtype="float16")
    same_as_the_library(transformers.AutoModelForCausalLM, source, tmp_path / "output", method)


@pytest.mark.parametrize("shape", [(), (0, 4)], ids=["a scalar", "no values"])
def test_a_weight_that_a_class_makes_float64_is_stored_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    class Scaled(transformers.BertModel):  # type: ignore[misc]
        config_class = transformers.BertConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.logit_scale = torch.nn.Parameter(torch.full(shape, 2.0, dtype=torch.float64))

    monkeypatch.setattr(sys.modules["transformers"], "Scaled", Scaled, raising=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Scaled(transformers.BertConfig(**sizes, vocab_size=100))
    source, output, reference = tmp_path / "source", tmp_path / "output", tmp_path / "reference"
    model.bfloat16().save_pretrained(source)
    transformers_model(Scaled, source, "nf4").save_pretrained(reference)
    quantized(source, output, "nf4")
    assert differing_files(reference, output) == []
    assert load_file(output / "model.safetensors")["logit_scale"].dtype == torch.float64


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_count_that_a_class_holds_as_a_float_is_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A batch norm that a class keeps in float32 is loaded so with its int64 count of batches."""

    class Normed(transformers.BertModel):  # type: ignore[misc]
        config_class = transformers.BertConfig
        _keep_in_fp32_modules_strict = ("norm",)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.norm = torch.nn.BatchNorm1d(8)
            self.norm.register_buffer("num_batches_tracked", torch.tensor(123_457))

    monkeypatch.setattr(sys.modules["transformers"], "Normed", Normed, raising=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Normed(transformers.BertConfig(**sizes, vocab_size=100))
    source, output = tmp_path / "source", tmp_path / "output"
    saved(model, source)
    assert load_file(source / "model.safetensors")["norm.num_batches_tracked"].dtype == torch.int64
    same_as_the_library(Normed, source, output, method)
    count = load_file(output / "model.safetensors")["norm.num_batches_tracked"]
    assert (count.dtype, count.item()) == (torch.float32, 123_457)
    dequantized(output, tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors")["norm.num_batches_tracked"].item() == 123_457


def test_codes_that_the_class_would_merge_are_named(tmp_path: Path) -> None:
    zoo.qwen3_moe().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(LocalFolder(tmp_path))
    given = {
        name: TensorSpec("bfloat16", tensor.shape, linear=name.endswith("_proj.weight"))
        for name, tensor in checkpoint.tensors.items()
    }
    found = examine(checkpoint, LoadRequest(None), given).packed_elsewhere
    assert set(found) == {name for name, spec in given.items() if spec.linear and ".experts." in name}
    assert found
