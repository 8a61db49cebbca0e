"""Sibling linears with one input, which serving engines compute as one layer."""

from __future__ import annotations

from collections.abc import Mapping

Groups = Mapping[tuple[str, ...], str]
"""The names that a checkpoint has beside each other → the name of the one parameter that they are loaded into."""

SGLANG: Groups = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}
"""SGLang 0.5.23: ``bitsandbytes_stacked_params_mapping`` of its models."""
VLLM: Groups = {
    **SGLANG,
    ("query", "key", "value"): "qkv_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
    ("w1", "w3"): "w13",
}
"""vLLM 0.33: ``packed_modules_mapping`` of its models, where the names are those of transformers."""
FUSED = (
    *VLLM,
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)
"""All that are kept, or quantized, together: other engines, and later ones, fuse further groups."""
