"""The denoisers that diffusers reads from single files: small ones, and those whose width its converters have fixed."""

from __future__ import annotations

from typing import Any

import diffusers

from original_names import ltx_model, sd3_model

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "ffn_dim": 128, "text_dim": 64, "freq_dim": 64,
    "in_channels": 4, "out_channels": 4, "cross_attn_norm": True,
}  # fmt: skip
WITH_IMAGES = {**WAN, "image_dim": 64, "added_kv_proj_dim": 64}
DIT = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 64}
SMALL: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": WITH_IMAGES,
    "WanVACETransformer3DModel": {**WAN, "vace_layers": [0], "vace_in_channels": 8},
    "SkyReelsV2Transformer3DModel": WITH_IMAGES,
    "ChronoEditTransformer3DModel": WITH_IMAGES,
    "ZImageTransformer2DModel": {
        "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64,
        "axes_dims": [8, 12, 12],
    },
    "Flux2Transformer2DModel": {
        "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 64, "timestep_guidance_channels": 64,
        "axes_dims_rope": (8, 8, 8, 8),
    },
    "QwenImageTransformer2DModel": {
        **DIT, "patch_size": 2, "in_channels": 16, "out_channels": 4, "axes_dims_rope": (4, 4, 8),
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 64, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 128, "in_channels": 16,
        "out_channels": 16, "text_in_dim": 64, "rope_axes_dim": (8, 12, 12),
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
        "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": [64, 64], "text_emb_dim": 64,
        "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (16, 8, 8), "max_resolution": (8, 8),
        "llama_layers": [0],
    },
    "MotifVideoTransformer3DModel": {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1,
        "num_single_layers": 1, "text_embed_dim": 64, "rope_axes_dim": (8, 12, 12),
    },
}  # fmt: skip
"""Arguments of classes that may be small."""
WIDE: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "ChromaTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "approximator_layers": 2},
    "HunyuanVideoTransformer3DModel": {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    "Lumina2Transformer2DModel": {"num_layers": 1, "num_refiner_layers": 2},
}
"""Of those whose width is a number in the code of diffusers' converters."""


def denoiser(name: str) -> Any:
    """A model of a class by its name."""
    made = {"SD3Transformer2DModel": sd3_model, "LTXVideoTransformer3DModel": ltx_model}
    if name in made:
        return made[name]()
    return getattr(diffusers, name)(**{**SMALL, **WIDE}[name])
