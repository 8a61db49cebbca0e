"""What single families of models do differently, for the rule in ``linear_layers``.

Only what changes which weights are quantized, or their dtype by more than a few bytes: transformers 5.23, diffusers
0.42.1.
"""

from __future__ import annotations

_FLOW = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
_WAN = (*_FLOW, "rope")
_JOY = ("time_embedder", "norm1", "norm2", "norm_out")
_KANDINSKY6 = ("time_embeddings", "pooled_bias", "modulation")

DIFFUSERS_FLOAT32: dict[str, tuple[str, ...]] = {
    "AnyFlowFARTransformer3DModel": _FLOW,
    "AnyFlowTransformer3DModel": _FLOW,
    "ChronoEditTransformer3DModel": _FLOW,
    "SkyReelsV2Transformer3DModel": _WAN,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "AutoencoderKLMiniMaxH3": ("encoder", "quant_conv", "norm1", "norm2", "norm_out", "scale1", "scale2"),
    "AutoencoderKLMiniMaxH3Audio": ("encoder", "decoder", "pre_block", "dec_in_proj", "mean_proj", "logs_proj"),
    "CosmosControlNetModel": ("learnable_pos_embed",),
    "CosmosTransformer3DModel": ("learnable_pos_embed",),
    "Flux3Transformer2DModel": ("norm_q", "norm_k"),
    "HeliosTransformer3DModel": (*_FLOW, "history_key_scale"),
    "JoyImageEditPlusTransformer3DModel": _JOY,
    "JoyImageEditTransformer3DModel": _JOY,
    "Kandinsky5Transformer3DModel": ("time_embeddings", "modulation", "visual_modulation", "text_modulation"),
    "Kandinsky6SRTransformer3DModel": _KANDINSKY6,
    "Kandinsky6Transformer3DModel": ("time_embeddings", "modulation"),
    "Krea2Transformer2DModel": ("norm", "norm1", "norm2", "norm_q", "norm_k"),
    "MiniMaxH3Transformer3DModel": (
        "proj_in", "audio_proj_in", "time_embedder", "proj_out", "audio_proj_out", "rope"),
    "WanAnimate2Transformer3DModel": (
        "time_embedding", "time_projection", "scale_shift_table", "norm1", "norm2", "norm3", "modulation"),
    "WanAnimateTransformer3DModel": (*_WAN, "motion_synthesis_weight"),
}  # fmt: skip
"""``_keep_in_fp32_modules`` by class: kept in float32 whatever the dtype, and never quantized."""

NEVER_QUANTIZED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), ("wo",)),
    "blip-2": ("query_tokens", "qformer"),
    "deepseek_v4": ("self_attn.compressor.gate_proj", "self_attn.compressor.kv_proj"),
    **dict.fromkeys(("glm_moe_dsa", "deepseek_v32", "axk2", "mistral_large4"), ("indexer.weights_proj",)),
    "gpt_oss": ("post_attention_layernorm", "input_layernorm", "norm"),
    "longcat_flash": ("classifier.weight",),
    "rwkv": ("time_decay", "time_first"),
}
"""``_keep_in_fp32_modules`` by model type: never quantized, and kept in float32 in a float16 model."""

FLOAT32: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ernie4_5_moe", "ernie4_5_vl_moe"), ("gate.weight", "moe_statics")),
    **dict.fromkeys(("beam", "inkling2", "inkling2_text", "mistral_large4"), ("mlp.gate.weight",)),
    "deepseek_v4": ("attn_hc", "ffn_hc", "hc_head", "input_layernorm", "norm", "post_attention_layernorm", "sinks"),
    "flint": ("gate.weight", "sinks"),
    "kyutai_speech_to_text": ("codec_model",),
    "nemo_speechlm": ("audio_tower", "multi_modal_projector"),
    "voxtral": ("embed_positions",),
}
"""``_keep_in_fp32_modules_strict`` by model type: float32 in any 16-bit model. Router biases always are."""

CONV1D = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))
"""Model types whose linear layers are ``Conv1D``: stored as (in, out), quantized as (out, in)."""

UNFUSED: frozenset[str] = frozenset()
"""Model types whose experts stay linear layers, and so are quantized."""

OWN_LINEARS = frozenset(("falcon", "ibert"))
"""Model types whose linear layers are of a class of their own, which transformers does not quantize."""
