"""Sibling linears with one input, which serving engines compute as one layer."""

from __future__ import annotations

from collections.abc import Mapping

SERVED: Mapping[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("query", "key", "value"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}
"""Those that vLLM (``packed_modules_mapping``) and SGLang (``bitsandbytes_stacked_params_mapping``) load into one
parameter: the names that the checkpoint has beside each other → the parameter's name."""
FUSED = (
    *SERVED,
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""All that are kept, or quantized, together: other engines, and later ones, fuse further groups."""
