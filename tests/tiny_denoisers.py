"""The denoisers that diffusers reads from single files: small ones, and those whose width its converters have fixed."""

from __future__ import annotations

from typing import Any

import diffusers

from original_names import ltx_model, sd3_model
from other_single_files import OTHERS
from qz.quantize.single_files.names import Layout

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
    "MochiTransformer3DModel": {
        "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 48,
        "pooled_projection_dim": 64, "in_channels": 4, "text_embed_dim": 64, "time_embed_dim": 64,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
        "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 64, "caption_projection_dim": 64,
        "out_channels": 4, "pos_embed_max_size": 16,
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
READ_ONLY: dict[str, tuple[dict[str, Any], Layout, dict[str, tuple[int, ...]]]] = {
    "SanaTransformer2DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64,
            "caption_channels": 64,
        },
        Layout(
            {
                "patch_embed": "x_embedder", "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
                "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "time_embed.linear": "t_block.1",
                "caption_projection.linear_([12])": r"y_embedder.y_proj.fc\1", "caption_norm": "attention_y_norm",
                "proj_out": "final_layer.linear", "scale_shift_table": "final_layer.scale_shift_table",
            },
            {
                "transformer_blocks": (
                    "blocks",
                    {
                        "attn1.to_[qkv]": "attn.qkv", "attn1.to_out.0": "attn.proj",
                        "attn2.to_q": "cross_attn.q_linear", "attn2.to_[kv]": "cross_attn.kv_linear",
                        "attn2.to_out.0": "cross_attn.proj", r"ff.conv_(\w+)": r"mlp.\1_conv.conv",
                    },
                )
            },
        ),
        {"pos_embed": (1, 1, 2), "y_embedder.y_embedding": (2, 2)},
    ),
    "LTX2VideoTransformer3DModel": (
        {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 32, "num_layers": 1, "caption_channels": 16, "audio_in_channels": 8,
            "audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
        },
        Layout(
            {
                "proj_in": "patchify_proj", "audio_proj_in": "audio_patchify_proj", "time_embed": "adaln_single",
                "audio_time_embed": "audio_adaln_single",
                r"av_cross_attn_(\w+)_scale_shift": r"av_ca_\1_scale_shift_adaln_single",
                r"av_cross_attn_(?:video|audio)_(\w+)_gate": r"av_ca_\1_gate_adaln_single",
            },
            {
                "transformer_blocks": (
                    "transformer_blocks",
                    {
                        r"(\w+)_a2v_cross_attn_scale_shift_table": r"scale_shift_table_a2v_ca_\1",
                        r"(\w+).norm_([qk])": r"\1.\2_norm",
                    },
                )
            },
        ),
        {"video_embeddings_connector.learnable_registers": (2, 2)},
    ),
    "CosmosTransformer3DModel": (
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "text_embed_dim": 16, "adaln_lora_dim": 4, "extra_pos_embed_type": None,
        },
        Layout(
            {
                "patch_embed.proj": "net.x_embedder.proj.1", "time_embed.t_embedder": "net.t_embedder.1",
                "time_embed.norm": "net.t_embedding_norm",
                "norm_out.linear_([12])": r"net.final_layer.adaln_modulation.\1", "proj_out": "net.final_layer.linear",
            },
            {
                "transformer_blocks": (
                    "net.blocks",
                    {
                        "norm1.linear_([12])": r"adaln_modulation_self_attn.\1",
                        "norm2.linear_([12])": r"adaln_modulation_cross_attn.\1",
                        "norm3.linear_([12])": r"adaln_modulation_mlp.\1",
                        "attn1.to_out.0": "self_attn.output_proj", "attn2.to_out.0": "cross_attn.output_proj",
                        "attn1.to_([qkv])": r"self_attn.\1_proj", "attn2.to_([qkv])": r"cross_attn.\1_proj",
                        "attn1.norm_([qk])": r"self_attn.\1_norm", "attn2.norm_([qk])": r"cross_attn.\1_norm",
                        "ff.net.0.proj": "mlp.layer1", "ff.net.2": "mlp.layer2",
                    },
                )
            },
        ),
        {"net.pos_embedder.seq": (2,)},
    ),
    **OTHERS,
}  # fmt: skip
"""Those whose originals have tensors that diffusers drops, and all others: arguments, names, and such tensors."""


def denoiser(name: str) -> Any:
    """A model of a class by its name."""
    made = {"SD3Transformer2DModel": sd3_model, "LTXVideoTransformer3DModel": ltx_model}
    if name in made:
        return made[name]()
    arguments = READ_ONLY[name][0] if name in READ_ONLY else {**SMALL, **WIDE}[name]
    return getattr(diffusers, name)(**arguments)
