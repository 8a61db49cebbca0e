"""Tiny models with experts, of the families that differ in how experts are stored; bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
GROUPS: dict[str, Any] = {
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SHARED: dict[str, Any] = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4}
MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3_moe": (t.Qwen3MoeForCausalLM, {"moe_intermediate_size": 32, "num_experts": 4, "head_dim": 16}),
    "qwen2_moe": (t.Qwen2MoeForCausalLM, {**SHARED}),
    "mixtral": (t.MixtralForCausalLM, {"intermediate_size": 32, "num_local_experts": 4}),
    "olmoe": (t.OlmoeForCausalLM, {"intermediate_size": 64, "num_experts": 4}),
    "gpt_oss": (
        t.GptOssForCausalLM,
        {"intermediate_size": 32, "num_local_experts": 4, "head_dim": 16},
    ),
    "deepseek_v3": (
        t.DeepseekV3ForCausalLM,
        GROUPS
        | {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    ),
    "glm4_moe": (t.Glm4MoeForCausalLM, GROUPS | {"head_dim": 16}),
    "granitemoe": (t.GraniteMoeForCausalLM, {"intermediate_size": 64, "num_local_experts": 4}),
    "qwen3_vl_moe_text": (t.Qwen3VLMoeTextModel, {"moe_intermediate_size": 64, "num_experts": 4, "head_dim": 16}),
}
"""Name → class, and what its config has beside ``COMMON``."""


def mixture(name: str, folder: Path) -> Path:
    """Save a model of ``MADE`` in ``folder``."""
    model_class, more = MADE[name]
    torch.manual_seed(0)
    config = model_class.config_class(**(COMMON | more))
    model_class(config).bfloat16().save_pretrained(folder)
    return folder
