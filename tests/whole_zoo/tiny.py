"""Small configs of any model type of transformers: each number is made smaller by what its name says it counts."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

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
    r".*max_position(?:_embedding)?s|n_positions|max_seq\w*|max_(?:source|target)_positions|n_ctx|seq_length|max_length"
)
_IMAGE = ("image_size", "pretrain_image_size", "crop_size", "resolution", "img_size", "sample_size")
_TOKEN = re.compile(r".*(?:_token|_id|_ids|_index|_idx)")
_AS_THEY_ARE = ("id2label", "label2id", "rope_parameters", "rope_scaling")

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
        return 3 + zlib.crc32(key.encode()) % 90
    limits = (
        (_VOCABULARY, 128),
        (_EXPERTS, 4),
        (re.compile(r"num_experts_per_tok|moe_top_?k|top_k|n_activated_experts"), 2),
        (re.compile(r"topk_group|n_group|n_shared_experts|first_k_dense_replace"), 1),
        (_POSITIONS, 64),
        (re.compile(r"(?:num_|norm_num_)groups|num_norm_groups"), 4),
    )
    for pattern, most in limits:
        if pattern.fullmatch(key):
            return min(value, most)
    if key in _IMAGE:
        return min(value, image)
    if key in ("patch_size", "encoder_stride") and value > 1:
        return min(value, 8)
    return min(value, layers) if _LAYERS.fullmatch(key) and not _NOT_LAYERS.search(key) else value


def _shrunk(config: dict[str, Any], rule: Rule, layers: int, image: int) -> dict[str, Any]:
    depths = {
        value
        for key, value in config.items()
        if type(value) is int and _LAYERS.fullmatch(key) and not _NOT_LAYERS.search(key)
    }
    new: dict[str, Any] = {}
    for key, value in config.items():
        if key in _AS_THEY_ARE or key.startswith(("tie_", "use_", "is_")):
            new[key] = value
        elif isinstance(value, dict):
            new[key] = _shrunk(value, rule, layers, image)
        elif type(value) is int:
            new[key] = rule(key, value, layers, image)
        elif isinstance(value, list) and len(value) in depths and len(value) > layers:
            kinds = list(dict.fromkeys(value)) if all(isinstance(each, str) for each in value) else []
            new[key] = (kinds + value)[:layers]
        elif isinstance(value, list) and re.fullmatch(r"depths|layers_per_stage|num_blocks|\w+_depths", key):
            new[key] = [min(each, 1) if type(each) is int else each for each in value]
        else:
            new[key] = value
    return new


def tiny_configs(model_type: str) -> Iterator[Any]:
    """Configs of a model type, the smallest first; those that the class refuses are left out."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    whole = config_class().to_dict()
    for key in ("transformers_version", "architectures", "dtype"):
        whole.pop(key, None)
    tries: list[tuple[Rule, int, int]] = [(_narrow, 2, 32), (_narrow, 2, 64), (_narrow, 4, 224)]
    tries += [(_shallow, 1, 224), (_shallow, 2, 224)]
    for rule, layers, image in tries:
        try:
            yield config_class.from_dict(json.loads(json.dumps(_shrunk(whole, rule, layers, image))))
        except Exception:  # whatever a class says against such numbers
            continue
