"""Every consumer with its rules, and the code that each rule was read from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qz.quantize.consumers import experts, layouts, packing, skips
from qz.quantize.consumers.contents import Contents
from qz.quantize.consumers.verdict import Consumer, Finding, Rule, Verdict

_SEVERITIES = ("error", "warning", "note")
_LOADER = "bitsandbytes_loader.py: BitsAndBytesModelLoader"
_SGLANG_QUANTIZATION = "srt/layers/quantization/bitsandbytes.py"
_SGLANG = "srt/model_loader/loader.py: BitsAndBytesModelLoader"

CONSUMERS: Mapping[str, Consumer] = {
    each.name: each
    for each in (
        Consumer(
            "transformers",
            "transformers",
            "transformers 5.23.0",
            (
                Rule("library", layouts.language_model, "PreTrainedModel.from_pretrained"),
                Rule("experts", experts.transformers_merges, "conversion_mapping.py, core_model_loading.py"),
            ),
        ),
        Consumer(
            "vllm",
            "vLLM",
            "vllm-bnb-plugin 0.0.3",
            (
                Rule("library", layouts.language_model, f"{_LOADER}._verify_model_compatibility"),
                Rule("storage", packing.storage, "quantization/config.py: BitsAndBytesConfig.__init__"),
                Rule("odd-size", packing.odd_sizes, "quantization/linear.py: create_weights"),
                Rule("split-group", skips.split_group_vllm, f"{_LOADER}._quantized_4bit_generator, last branch"),
                Rule("unlisted-skip", skips.unlisted_vllm, "quantization/utils.py: is_layer_skipped_bnb"),
                Rule("int8-capitals", packing.int8_capitals, f"{_LOADER}._quantized_8bit_generator"),
                Rule("ending-names", packing.ending_names, f"{_LOADER}._quantized_4bit_generator, _parse_quant_state"),
                Rule("conv1d", layouts.conv1d, "vLLM, models/gpt2.py: load_weights"),
                Rule("experts-int8", experts.vllm_int8, f"{_LOADER}._get_bnb_target_modules"),
                Rule("experts-fp4", experts.vllm_fp4, f"{_LOADER}._fuse_moe_quant_states"),
                Rule("experts-layout", experts.vllm_layout, f"{_LOADER}._fuse_moe_quant_states"),
                Rule("experts-gate", experts.without_gates, f"{_LOADER}._fuse_moe_quant_states"),
                Rule("experts-some", experts.vllm_some, f"{_LOADER}._fuse_moe_quant_states"),
                Rule("experts-blocks", experts.whole_blocks, f"{_LOADER}._fuse_moe_quant_states"),
                Rule("shared-gate", experts.shared_gate, "vLLM, models/qwen2_moe.py: Qwen2MoeSparseMoeBlock"),
                Rule("stray-files", packing.stray_files_without_index, f"{_LOADER}._prepare_weights"),
                Rule("tensor-parallel", packing.tensor_parallel, f"{_LOADER}._verify_model_compatibility"),
                Rule("plugin", layouts.vllm_plugin, "vllm.general_plugins: bitsandbytes"),
                Rule("int8-eager", layouts.vllm_eager, "quantization/linear.py: _apply_8bit_weight"),
            ),
        ),
        Consumer(
            "sglang",
            "SGLang",
            "sglang 0.5.23",
            (
                Rule("library", layouts.language_model, f"{_SGLANG}._load_weights"),
                Rule("storage", packing.storage, f"{_SGLANG_QUANTIZATION}: BitsAndBytesConfig"),
                Rule("odd-size", packing.odd_sizes, f"{_SGLANG_QUANTIZATION}: create_weights"),
                Rule("split-group", skips.split_group_sglang, f"{_SGLANG}._load_weights"),
                Rule(
                    "unlisted-skip",
                    skips.unlisted_sglang,
                    f"{_SGLANG_QUANTIZATION}: is_layer_skipped_bnb",
                ),
                Rule("int8-capitals", packing.int8_capitals, f"{_SGLANG}._quantized_8bit_generator"),
                Rule("class", layouts.sglang_class, f"{_SGLANG}._load_weights"),
                Rule("ending-names", packing.ending_names, f"{_SGLANG}._quantized_4bit_generator, _parse_quant_state"),
                Rule("experts", experts.sglang, "srt/models: bitsandbytes_stacked_params_mapping"),
                Rule("stray-files", packing.stray_files, f"{_SGLANG}._prepare_weights"),
                Rule("tensor-parallel", packing.tensor_parallel, f"{_SGLANG}._load_weights"),
            ),
        ),
        Consumer(
            "peft",
            "PEFT",
            "peft 0.21.2",
            (
                Rule("library", layouts.diffusers_model, "PeftModel, add_adapter"),
                Rule("experts", experts.peft_needs_a_loader, "transformers: conversion_mapping.py"),
            ),
        ),
        Consumer(
            "unsloth",
            "unsloth",
            "unsloth 2026.10.9",
            (
                Rule("library", layouts.language_model, "FastModel.from_pretrained"),
                Rule("experts-blocks", experts.unsloth_blocks, "unsloth_zoo: _PerExpertStackDeserialize"),
                Rule("experts-gate", experts.without_gates, "unsloth_zoo: _bnb4bit_per_expert_conversions"),
                Rule("int8", layouts.unsloth_int8, "models/loader.py: load_in_8bit"),
                Rule("gpu", layouts.needs_gpu, "device_type.py"),
            ),
        ),
        Consumer(
            "invokeai",
            "InvokeAI",
            "invokeai 6.14.2",
            (
                Rule("single-file", layouts.invokeai_flux, "configs/main.py: Main_BnBNF4_FLUX_Config"),
                Rule(
                    "rest",
                    layouts.invokeai_quantizes_the_rest,
                    "quantization/bnb_nf4.py: InvokeLinearNF4._load_from_state_dict",
                ),
                Rule("t5", layouts.invokeai_t5, "configs/t5_encoder.py: T5Encoder_BnBLLMint8_Config"),
                Rule("gpu", layouts.needs_gpu, "quantization/bnb_nf4.py"),
            ),
        ),
        Consumer(
            "comfyui",
            "ComfyUI",
            "ComfyUI_bnb_nf4_fp4_Loaders dd2f774",
            (
                Rule("single-file", layouts.comfyui, "UNETLoaderNF4, CheckpointLoaderNF4; ForgeLoader4Bit"),
                Rule("shapes", layouts.comfyui_shapes, "ComfyUI a9fc751, comfy/model_detection.py: detect_unet_config"),
                Rule("rest", layouts.comfyui_quantizes_the_rest, "ForgeLoader4Bit._load_from_state_dict"),
                Rule("gpu", layouts.needs_gpu, "OPS.Linear.forward: bitsandbytes.matmul_4bit"),
            ),
        ),
        Consumer(
            "diffusers-cpu",
            "diffusers without a GPU",
            "diffusers 0.42.1",
            (
                Rule("library", layouts.diffusers_model, "ModelMixin.from_pretrained"),
                Rule("no-gpu", layouts.diffusers_without_gpu, "quantizers/bitsandbytes: validate_environment"),
                Rule("experts", experts.transformers_merges, "transformers: conversion_mapping.py"),
            ),
        ),
    )
}


def judge(contents: Contents, names: Iterable[str]) -> dict[str, Verdict]:
    """What each of the consumers named makes of a checkpoint; ``names`` are keys of ``CONSUMERS``."""
    return {name: _judged(CONSUMERS[name], contents) for name in names}


def _judged(consumer: Consumer, contents: Contents) -> Verdict:
    if contents.errors:
        text = f"nothing loads it as it is ({', '.join(contents.errors)})."
        return Verdict(consumer.name, consumer.package, False, (Finding("error", "checkpoint", text),))
    if not contents.packed:
        return Verdict(consumer.name, consumer.package, None)
    found = [finding for rule in consumer.rules for finding in rule.check(contents)]
    found.sort(key=lambda each: _SEVERITIES.index(each.severity))
    return Verdict(consumer.name, consumer.package, not any(e.severity == "error" for e in found), tuple(found))
