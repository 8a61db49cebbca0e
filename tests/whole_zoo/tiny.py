"""Small configs of any model type of transformers: each number is made smaller by what its name says it counts."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_LAYERS = re.compile(r"(?:.*(?:num|n)_(?:\w+_)?layers?|(?:\w+_)?(?:layers|depth|blocks))")
_NOT_LAYERS = re.compile(
    r"kv_shared|feat_extract|adapter|dense|hash|intermediate|per_attn|skip|logits|post|conv|nextn|mtp"
)
_HEADS = re.compile(r"(?:\w+_)?(?:num_|n_)?(?:\w+_)?(?:heads?)")
_KEY_HEADS = re.compile(r".*(?:key_value|kv|key)_(?:heads|groups)")
_HEAD_DIM = re.compile(r".*head_?(?:dim|size)|dim_head|d_kv|attention_(?:key|value)_size|mamba_d_head|kv_channels")
_INNER = re.compile(
    r".*(?:intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|ffn_size)|d_ff|mlp_dim|n_inner|dim_ff"
)
_WIDTH = re.compile(
    r"(?:.*_)?(?:hidden_size|d_model|n_embd|dim|width|hidden|projection_size|rank|d_state|state_size|channels|units)|"
    r".*embedding_size|pooler_output_size"
)
_LEFT = re.compile(
    r"num_channels|in_cha|rope|rotary|mel|patch|input_dim|kernel|conv_dim|input_channels|coord|num_labels|multiplier|"
    r"n_channels|audio_channels|point_dim|^max_|factor|expansion|ratio"
)
_EXPERTS = re.compile(r"(?:\w+_)?experts(?:_\d+)?")
_VOCABULARY = re.compile(r".*vocab_size.*|n_vocab|.*codebook_size|num_codes|num_embeddings|n_tokens")
_POSITIONS = re.compile(
    r"context_size|.*max_position(?:_embedding)?s|n_positions|max_seq\w*|max_(?:source|target)_positions|n_ctx|seq_length|(?:model_)?max_length"
)
_IMAGE = ("image_size", "pretrain_image_size", "crop_size", "resolution", "img_size", "sample_size")
_TOKEN = re.compile(r".*(?:_token|_id|_ids|_index|_idx)")
_MARK = re.compile(r"(?:image|video|audio)_token_(?:id|index)")
_AS_THEY_ARE = ("id2label", "label2id", "rope_parameters", "rope_scaling")
_OF_STAGES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
"""Follow from the number of layers."""
_EMBED = re.compile(r".*(?:hidden_size|hidden_dim|embed_dim)")
_WIDTHS = re.compile(
    r".*(?:hidden_sizes|embed_dims?|widths|dims|channels|conv_dim|tdnn_dim|decoder_hidden_size|channel_list|filters)|"
    r"embed_dim_per_stage"
)
_EFFICIENTNET: dict[str, Any] = {
    "in_channels": [32, 16],
    "out_channels": [16, 64],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "expand_ratios": [1, 6],
    "num_block_repeats": [1, 1],
    "depthwise_padding": [],
    "width_coefficient": 1.0,
    "hidden_dim": 1280,
}
"""Two stages, in widths that follow from one another."""
_VIT: dict[str, Any] = {"embed_dim": 64, "depth": 1, "num_heads": 2}
"""Of timm's vision transformers."""
_OF_A_SAM: dict[str, Any] = {
    "prompt_encoder_config.image_size": 32,
    "prompt_encoder_config.image_embedding_size": 4,
    "vision_config.num_pos_feats": 32,
}
"""A picture of 32 by 32 pixels in patches of eight."""
_OF_A_LATER_SAM: dict[str, Any] = {
    "vision_config.backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
    "prompt_encoder_config.image_size": 32,
    "prompt_encoder_config.patch_size": 16,
}
"""A picture of 32 by 32 pixels at a quarter, an eighth and a sixteenth of its size."""
_OF_DOTS3: dict[str, Any] = {
    "per_layer_config": {
        "1": {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 64,
            "kv_lora_rank": 64,
            "head_dim": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
    }
}
"""Its layer of sliding attention, which has sizes of its own."""
_LONG_AND_SHORT = {
    f"{way}_{ratio}": [kernel, 1, [each // 2 for each in kernel]]
    for way, kernels in {
        "vertical_long_to_small_conv": ([7, 1], [5, 1], [3, 1]),
        "horizontal_small_to_long_conv": ([1, 7], [1, 5], [1, 3]),
        "symmetric_conv_long": ([7, 7], [5, 5], [3, 3]),
    }.items()
    for ratio, kernel in zip(("longratio", "midratio", "shortratio"), kernels, strict=True)
} | {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
"""Convolutions of PP-OCR's detectors: kernel, stride and padding."""
_OF_A_DETECTOR: dict[str, Any] = {
    "intraclass_block_config": _LONG_AND_SHORT,
    "kernel_list": [3, 2, 2],
    "backbone_config.out_features": ["stage1", "stage2", "stage3", "stage4"],
    "backbone_config.out_indices": [1, 2, 3, 4],
}
NUMBERS: dict[str, dict[str, Any]] = {
    "align_vision_model": _EFFICIENTNET,
    "autoformer": {"prediction_length": 8},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bros": {"dim_bbox_projection": 16, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "clvp_encoder": {"num_attention_heads": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "depth_pro": {"intermediate_hook_ids": [0, 0]},
    "dots3_note": {f"text_config.{key}": value for key, value in _OF_DOTS3.items()},
    "dots3_note_text": _OF_DOTS3,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [2, 2, 4]},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "efficientloftr": {
        "out_features": [64, 64, 64, 64],
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_stride": [2, 1, 2, 2],
        "stage_block_stride": [[2], [1], [2], [2]],
        "stage_in_channels": [1, 64, 64, 64],
        "stage_block_in_channels": [[1], [64], [64], [64]],
        "stage_block_out_channels": [[64], [64], [64], [64]],
        "fine_fusion_dims": [64, 64, 64],
    },
    "edgetam": _OF_A_LATER_SAM | {"vision_config.backbone_channel_list": [64, 48, 32, 24]},
    "edgetam_video": _OF_A_LATER_SAM | {"vision_config.backbone_channel_list": [64, 48, 32, 24]},
    "efficientnet": _EFFICIENTNET,
    "informer": {"prediction_length": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lw_detr": {"projector_scale_factors": [1.0], "num_feature_levels": 1},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 64,
    },
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, "<|visual token 000000|>": 6}},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "hiera": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_large_patch14_336",
        "vision_config.model_args": {"img_size": [28, 28], "global_pool": "", "ref_feat_shape": [2, 2]} | _VIT,
    },
    "omdet-turbo": {
        "apply_layernorm_after_vision_backbone": False,
        "encoder_in_channels": [16, 24, 32],
        "vision_features_channels": [64, 64, 64],
        "num_queries": 10,
    },
    "pp_ocrv5_server_det": _OF_A_DETECTOR
    | {"backbone_config.stage_out_channels": [32, 128, 256, 512], "scale_factor_list": [1, 2, 4, 8]},
    "pp_ocrv6_medium_det": _OF_A_DETECTOR
    | {
        "backbone_config.block_configs": [[[3, 24, 24, 1, True]]] + [[[3, 24, 24, 2, False]]] * 3,
        "backbone_config.stem_channels": [3, 12, 24],
        "backbone_config.stage_out_channels": [24, 24, 24, 24],
        "scale_factor_list": [1, 2, 4, 8],
    },
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 64,
        "talker_config.spatial_merge_size": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True},
    "sam": _OF_A_SAM,
    "sam_hq": _OF_A_SAM,
    "sam2": _OF_A_LATER_SAM,
    "sam2_video": _OF_A_LATER_SAM,
    "sam2_hiera_det_model": {"hidden_size": 16, "embed_dim_per_stage": [16, 32, 64, 128]},
    "sam2_vision_model": {"backbone_channel_list": [128, 64, 32, 16]},
    "seggpt": {"image_size": [64, 32], "pretrain_image_size": 32},
    "sam3_tracker": {"vision_config.backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sapiens2": {"head_config": {"upsample_out_channels": [32, 16], "conv_out_channels": [16]}},
    "shieldgemma2": {"yes_token_index": 10, "no_token_index": 11},
    "step3p7": {"text_config.sliding_window": 8},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "textnet": {"stem_out_channels": 8, "image_size": [64, 64]},
    "timm_backbone": {"backbone": "test_convnext"},
    "time_series_transformer": {"prediction_length": 8},
    "vitmatte": {"backbone_config.patch_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
}
"""What a class's default config lacks, or what does not follow from it, by model type and path in the config."""

Rule = Callable[[str, int, int, int], int]


def _narrow(key: str, value: int, layers: int, image: int) -> int:
    """Fewer layers, and widths of 64 and 128."""
    found = _shallow(key, value, layers, image)
    if found != value:
        return found
    if _KEY_HEADS.fullmatch(key):
        return min(value, 2)
    if _HEADS.fullmatch(key):
        return min(value, 4)
    if _HEAD_DIM.fullmatch(key):
        return min(value, 16)
    if _LEFT.search(key) and not re.search(r"hidden_size|hidden_dim|embed_dim|embedding_size", key):
        return value
    if _INNER.fullmatch(key) and value >= 64:
        return 128
    return 64 if _WIDTH.fullmatch(key) and value >= 32 else value


def _shallow(key: str, value: int, layers: int, image: int) -> int:
    """Fewer layers, experts, tokens and positions, in the widths that the config has."""
    if _TOKEN.fullmatch(key) and value >= 100:
        return _token(key)
    limits = (
        (_VOCABULARY, 256),
        (_EXPERTS, 4),
        (re.compile(r"num_experts_per_tok(?:en)?|moe_top_?k|moe_k|top_k|n_activated_experts"), 2),
        (re.compile(r"topk_group|n_group|num_(?:expert_)?group|n_shared_experts|first_k_dense_replace"), 1),
        (re.compile(r"(?:mamba_)?n_?groups"), 1),
        (re.compile(r"mm_tokens_per_image"), 4),
        (_POSITIONS, 128),
        (re.compile(r"(?:num_|norm_num_)groups|num_norm_groups"), 4),
        (re.compile(r"upsample_groups|num_latents|d_latents"), 64),
        (re.compile(r"(?:num|n|base)_filters"), 4),  # doubled in every stage
        (re.compile(r"upsample_initial_channel"), 128),
    )
    for pattern, most in limits:
        if pattern.fullmatch(key):
            return min(value, most)
    if key in _IMAGE:
        return min(value, image)
    if key in ("patch_size", "encoder_stride") and value > 1:
        return min(value, 8)
    return min(value, layers) if _LAYERS.fullmatch(key) and not _NOT_LAYERS.search(key) else value


def _token(key: str) -> int:
    """A token of small vocabularies, one for each name."""
    return 3 + zlib.crc32(key.encode()) % 90


def _divided(by: int) -> Rule:
    """Fewer layers, and every width divided by one number, so that their ratios stay."""

    def rule(key: str, value: int, layers: int, image: int) -> int:
        if _KEY_HEADS.fullmatch(key) or _HEADS.fullmatch(key) or _HEAD_DIM.fullmatch(key):
            return value
        is_width = _INNER.fullmatch(key) or (_WIDTH.fullmatch(key) and not _LEFT.search(key)) or _EMBED.fullmatch(key)
        if is_width:
            return value // by if value >= 8 * by and value % by == 0 else value
        return _shallow(key, value, layers, image)

    return rule


def _shrunk(config: dict[str, Any], rule: Rule, layers: int, image: int) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in config):  # a table of numbers
        return config
    depths = {
        value
        for key, value in config.items()
        if type(value) is int and value > 2 and _LAYERS.fullmatch(key) and not _NOT_LAYERS.search(key)
    }
    stages = config.get("depths")
    if isinstance(stages, list):
        depths -= {len(stages)}
    kinds = config.get("layer_types") or config.get("layers_block_type") or config.get("block_types")
    if isinstance(kinds, list) and len(kinds) in depths and all(isinstance(kind, str) for kind in kinds):
        layers = max(layers, min(len(set(kinds)), 5))
    outputs = config.get("out_indices")
    if isinstance(outputs, list) and len(outputs) > 1 and depths:
        layers = max(layers, len(outputs))
    if config.get("model_type") == "timm_backbone" and config.get("backbone"):  # from another library, and never small
        return _backbone(len(outputs) if isinstance(outputs, list) else 1)
    if isinstance(config.get("architecture"), str) and "model_args" in config:  # a model of timm, by its name
        config = config | _of_timm(config["architecture"], config["model_args"])
    new: dict[str, Any] = {}
    for key, value in config.items():
        if key in _OF_STAGES and depths and not isinstance(stages, list):
            if key == "out_indices" and isinstance(value, list) and len(value) > 1:
                new[key] = list(range(1, len(value) + 1))
        elif key in _AS_THEY_ARE or key.startswith(("tie_", "use_", "is_")):
            new[key] = value
        elif key == "per_layer_config" and isinstance(value, dict) and all(each.isdigit() for each in value) and value:
            new[key] = {str(layers - 1): next(iter(value.values()))}
        elif isinstance(value, dict):
            new[key] = _shrunk(value, rule, layers, image)
        elif isinstance(stages, list) and value == len(stages):
            new[key] = value
        elif value is None and _MARK.fullmatch(key):
            new[key] = _token(key)
        elif type(value) is int:
            new[key] = rule(key, value, layers, image)
        elif isinstance(value, list):
            new[key] = _shrunk_list(key, value, rule, layers, depths)
        else:
            new[key] = value
    return new | _fitting(config, new)


def _shrunk_list(key: str, value: list[Any], rule: Rule, layers: int, depths: set[int]) -> list[Any]:
    if len(value) in depths and len(value) > layers:
        kinds = list(dict.fromkeys(value)) if all(isinstance(each, str) for each in value) else []
        return (kinds + value)[:layers]
    if not value or not all(type(each) is int for each in value):
        return value
    if re.fullmatch(r"depths|layers_per_stage|num_blocks|num_layers|\w+_depths|hidden_layers|stage_num_blocks", key):
        return [min(each, 1) for each in value]
    if re.fullmatch(r"\w*(?:token_ids?|token_index)", key):
        return [3 + each % 90 for each in value]
    if _WIDTHS.fullmatch(key) and rule is not _shallow:
        by = 8 if min(value) >= 64 else 4
        return [max(8, each // by) if each % by == 0 and each >= 32 else each for each in value]
    return value


def _fitting(config: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Numbers that follow from others: the width of a head, the parts of a rotary embedding, the heads of Mamba."""
    found: dict[str, Any] = {}
    if "vocab_size" in new and new["vocab_size"] is None:
        found["vocab_size"] = 128
    if {"d_head", "d_model", "n_head"} <= new.keys():
        found["d_head"] = new["d_model"] // new["n_head"]
    if type(new.get("rotary_dim")) is int and {"n_embd", "n_head"} <= new.keys():
        found["rotary_dim"] = min(new["rotary_dim"], new["n_embd"] // new["n_head"])
    if new.get("num_experts_per_tok", 0) is None:
        found["num_experts_per_tok"] = 2
    if {"n_mamba_heads", "mamba_headdim", "mamba_expand"} <= new.keys():
        found["mamba_headdim"] = int(new["mamba_expand"] * new["hidden_size"]) // new["n_mamba_heads"]
    if (
        config.get("attention_hidden_size") == 2 * (config.get("hidden_size") or 0)
        and type(new.get("num_attention_heads")) is int
    ):
        found["attention_hidden_size"] = 2 * new["hidden_size"]
        found["attention_head_dim"] = 2 * new["hidden_size"] // new["num_attention_heads"]
    if new.get("num_kv_shared_layers"):
        found["num_kv_shared_layers"] = 0
    width, heads = new.get("hidden_size"), new.get("num_attention_heads")
    if not isinstance(width, int):
        return found
    head = new.get("head_dim")
    if "head_dim" in new and head is None and isinstance(heads, int):
        found["head_dim"] = head = width // heads
    had, had_heads = config.get("head_dim"), config.get("num_attention_heads")
    fits = type(had) is int and type(had_heads) is int and had * had_heads == config["hidden_size"]
    if isinstance(heads, int) and fits:
        found["head_dim"] = head = max(width // heads, 8)
    if "mamba_n_heads" in new and "mamba_d_head" in new:
        found |= {"mamba_n_heads": 8, "mamba_d_head": int(new.get("mamba_expand") or 2) * width // 8}
    if {"expand", "num_heads", "head_dim", "state_size"} <= new.keys():
        found |= {"head_dim": 16, "num_heads": int(new["expand"]) * width // 16}
    if type(heads) is int and config.get("num_key_value_heads", 0) in (None, had_heads):
        found["num_key_value_heads"] = heads
    both = (config.get("qk_nope_head_dim") or 0) + (config.get("qk_rope_head_dim") or 0)
    if both and had == both:
        found["head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
    if {"qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"} <= new.keys():
        found["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
    half = (head or (width // heads if type(heads) is int and heads else 0)) // 2
    if isinstance(new.get("rope_parameters"), dict) and half:
        found["rope_parameters"] = _sections(new["rope_parameters"], half)
    return found


def _sections(rope: dict[str, Any], half: int) -> dict[str, Any]:
    """The sections of a multimodal rotary embedding, for a smaller head."""
    new: dict[str, Any] = {
        key: _sections(value, half) if isinstance(value, dict) else value for key, value in rope.items()
    }
    parts = new.get("mrope_section")
    if isinstance(parts, list) and len(parts) > 1:
        total = max(int(half * (new.get("partial_rotary_factor") or 1)), len(parts))
        new["mrope_section"] = [
            total // len(parts) + (total % len(parts) if not index else 0) for index in range(len(parts))
        ]
    if new.get("rope_type") == "dynamic" and not new.get("alpha"):
        new["alpha"] = 1000.0
    return new


def _of_timm(architecture: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
    """A small vision transformer of this architecture, or one of the models that timm has for tests."""
    if architecture.startswith("vit"):
        return {"model_args": (arguments or {}) | _VIT}
    if (arguments or {}).get("features_only"):
        return {"architecture": "test_convnext", "model_args": arguments}
    return {"architecture": "test_vit", "model_args": None}


def _backbone(stages: int) -> dict[str, Any]:
    names = [f"stage{number}" for number in range(1, 5)]
    return {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
            "layer_type": "basic", "out_features": names[-stages:]}  # fmt: skip


def tiny_configs(config_class: Any, model_type: str) -> Iterator[Any]:
    """Configs of a model type, the smallest first, and the errors of those that the class refuses."""
    try:
        whole = config_class().to_dict()
    except Exception as error:  # a class may have no config by default
        yield error
        whole = {}
    for key in ("transformers_version", "architectures", "dtype"):
        whole.pop(key, None)
    _put_sections(whole, _code(config_class))
    tries: list[tuple[Rule, int, int, bool]] = [(_narrow, 2, 32, False), (_narrow, 2, 64, False)]
    tries += [(_divided(by), 2, 64, False) for by in (16, 8, 4)]
    tries += [(_narrow, 2, 32, True), (_divided(16), 2, 64, True), (_narrow, 4, 224, False)]
    tries += [(_shallow, 1, 224, False), (_shallow, 2, 224, False)]
    for rule, layers, image, alike in tries:
        try:
            small = _shrunk(whole, rule, layers, image)
            if alike:
                _keep_alike(whole, small, dict(_changed(whole, small)))
            _put_numbers(small, model_type)
            yield config_class.from_dict(json.loads(json.dumps(small)))
        except Exception as error:  # whatever a class says against such numbers
            yield error


def _code(config_class: Any) -> str:
    """The source of the models of a config."""
    spec = find_spec(config_class.__module__.replace("configuration_", "modeling_"))
    return Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""


def _put_sections(config: dict[str, Any], code: str) -> None:
    """Write down the sections of rotary embeddings that the code has a default for, which fits large heads only."""
    for value in config.values():
        if isinstance(value, dict):
            inner = CONFIG_MAPPING_NAMES.get(str(value.get("model_type")))
            _put_sections(value, _code(getattr(transformers, inner)) if inner else code)
    if "mrope_section" in code and "rope_theta" in (config.get("rope_parameters") or {}):
        config["rope_parameters"].setdefault("mrope_section", [1, 1, 1])


def _changed(whole: Any, small: Any) -> Iterator[tuple[int, int]]:
    """Widths that have become others, and which."""
    if isinstance(whole, dict) and isinstance(small, dict):
        for key, value in whole.items():
            if type(value) is int and value >= 64 and _WIDTH.fullmatch(key) and small.get(key) not in (value, None):
                yield value, small[key]
            else:
                yield from _changed(value, small.get(key))


def _keep_alike(whole: dict[str, Any], small: dict[str, Any], changed: dict[int, int]) -> None:
    """What was equal to a width stays equal to it, whatever its name says."""
    for key, value in small.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            _keep_alike(whole[key], value, changed)
        elif type(value) is int and value == whole.get(key) and value in changed:
            small[key] = changed[value]


def _put_numbers(config: dict[str, Any], model_type: str) -> None:
    """What a default config lacks, of the type and of the types inside."""
    for path, value in NUMBERS.get(model_type, {}).items():
        put(config, path, value)
    for value in list(config.values()):
        if isinstance(value, dict) and value.get("model_type") in NUMBERS:
            _put_numbers(value, value["model_type"])


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Write a number down in a config, or in the config inside it that the path names."""
    *outer, last = path.split(".")
    for key in outer:
        config = config[key] if isinstance(config.get(key), dict) else config.setdefault(key, {})
    config[last] = value
