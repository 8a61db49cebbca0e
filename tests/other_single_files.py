"""Classes of single files that qz reads and does not write: small models of them, and their tensors' original names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from qz.quantize.single_files.names import LAYOUTS, Layout

Pair = tuple[str, str | Callable[[re.Match[str]], str]]


class Renamed(Layout):
    """Names in diffusers in which every pattern is replaced, one after the other."""

    pairs: Sequence[Pair]

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__()
        object.__setattr__(self, "pairs", pairs)

    def original(self, name: str) -> str:
        for pattern, other in self.pairs:
            name = re.sub(pattern, other, name)
        return name


class OfWan(Renamed):
    """The same, and then as in Wan."""

    def original(self, name: str) -> str:
        return LAYOUTS["WanTransformer3DModel"].original(super().original(name))


OTHERS: dict[str, tuple[dict[str, Any], Layout, dict[str, tuple[int, ...]]]] = {
    "AutoencoderDC": (
        {
            "attention_head_dim": 8, "latent_channels": 4, "encoder_block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 16), "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1), "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
        },
        Renamed([
            (r"\.attn\.to_[qkv]\.", ".context_module.main.qkv.conv."),
            (r"\.attn\.to_qkv_multiscale\.0\.proj_in", ".context_module.main.aggreg.0.0"),
            (r"\.attn\.to_qkv_multiscale\.0\.proj_out", ".context_module.main.aggreg.0.1"),
            (r"\.attn\.to_out\.", ".context_module.main.proj.conv."),
            (r"\.attn\.norm_out", ".context_module.main.proj.norm"),
            (r"conv_out\.conv_inverted", "local_module.main.inverted_conv.conv"),
            (r"conv_out\.conv_depth", "local_module.main.depth_conv.conv"),
            (r"conv_out\.conv_point", "local_module.main.point_conv.conv"),
            (r"conv_out\.norm\.", "local_module.main.point_conv.norm."),
            (r"(blocks\.\d\.\d)\.conv([12])\.", r"\1.main.conv\2.conv."),
            (r"(blocks\.\d\.\d)\.norm\.", r"\1.main.conv2.norm."),
            (r"(blocks\.\d\.\d)\.conv\.", r"\1.main.conv.conv."),
            (r"(?:down|up)_blocks\.(\d)\.(\d)", r"stages.\1.op_list.\2"),
            (r"coder\.conv_in", "coder.project_in.conv"), (r"encoder\.conv_out", "encoder.project_out.0.conv"),
            (r"decoder\.norm_out", "decoder.project_out.0"), (r"decoder\.conv_out", "decoder.project_out.2.conv"),
        ]),
        {
            "encoder.stages.1.op_list.0.context_module.main.qkv.conv.weight": (48, 2, 1, 1),
            "decoder.stages.1.op_list.0.context_module.main.qkv.conv.weight": (48, 2, 1, 1),
            "encoder.stages.1.op_list.0.context_module.main.proj.conv.weight": (16, 2, 1, 1),
            "decoder.stages.1.op_list.0.context_module.main.proj.conv.weight": (16, 2, 1, 1),
        },
    ),
    "AutoencoderKLLTX2Audio": (
        {},
        Renamed([
            ("^latents_mean", "per_channel_statistics.mean-of-means"),
            ("^latents_std", "per_channel_statistics.std-of-means"), ("^", "audio_vae."),
        ]),
        {},
    ),
    "AutoencoderKLLTX2Video": (
        {
            "block_out_channels": (8, 16, 16, 16), "decoder_block_out_channels": (8, 16, 16), "latent_channels": 8,
            "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1),
        },
        Renamed([
            ("^latents_mean", "per_channel_statistics.mean-of-means"),
            ("^latents_std", "per_channel_statistics.std-of-means"), ("resnets", "res_blocks"),
            (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down#{2 * int(m[1]) + 1}"),
            (r"down_blocks\.(\d)", lambda m: f"down#{2 * int(m[1])}"), (r"encoder\.mid_block", "encoder.down#8"),
            (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up#{2 * int(m[1]) + 1}"),
            (r"up_blocks\.(\d)", lambda m: f"up#{2 * int(m[1]) + 2}"), (r"decoder\.mid_block", "decoder.up#0"),
            ("#", "_blocks."), ("^", "vae."),
        ]),
        {
            "vae.per_channel_statistics.channel": (2,),
        },
    ),
    "AutoencoderKLLTXVideo": (
        {
            "block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 32, 32),
            "latent_channels": 8, "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
        Renamed([
            ("^latents_mean", "per_channel_statistics.mean-of-means"),
            ("^latents_std", "per_channel_statistics.std-of-means"), ("resnets", "res_blocks"),
            (r"conv_shortcut\.conv", "conv_shortcut"), (r"norm3\.", "norm3.norm."),
            (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down#{3 * int(m[1]) + 1}"),
            (r"down_blocks\.(\d)\.conv_out", lambda m: f"down#{3 * int(m[1]) + 2}"),
            (r"down_blocks\.(\d)", lambda m: "down#" + "0368"[int(m[1])]), (r"encoder\.mid_block", "encoder.down#9"),
            (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: "up#" + "?258"[int(m[1])]),
            (r"up_blocks\.(\d)\.conv_in", lambda m: "up#" + "??47"[int(m[1])]),
            (r"up_blocks\.(\d)", lambda m: "up#" + "1369"[int(m[1])]), (r"decoder\.mid_block", "decoder.up#0"),
            ("#", "_blocks."), ("^", "vae."),
        ]),
        {
            "vae.per_channel_statistics.channel": (2,),
        },
    ),
    "AutoencoderKLWan": (
        {
            "base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
        },
        Renamed([
            (r"mid_block\.resnets\.0", "middle.0"), (r"mid_block\.resnets\.1", "middle.2"),
            (r"mid_block\.attentions\.0", "middle.1"), (r"coder\.norm_out", "coder.head.0"),
            (r"coder\.conv_out", "coder.head.2"), (r"coder\.conv_in", "coder.conv1"), ("^quant_conv", "conv1"),
            ("^post_quant_conv", "conv2"), (r"encoder\.down_blocks", "encoder.downsamples"),
            (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
            (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
            (r"(samples\.\d+|middle\.[02])\.norm1", r"\1.residual.0"),
            (r"(samples\.\d+|middle\.[02])\.conv1", r"\1.residual.2"),
            (r"(samples\.\d+|middle\.[02])\.norm2", r"\1.residual.3"),
            (r"(samples\.\d+|middle\.[02])\.conv2", r"\1.residual.6"), ("conv_shortcut", "shortcut"),
        ]),
        {},
    ),
    "ControlNetModel": (
        {
            "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
            "conditioning_embedding_out_channels": (8, 8, 8, 8),
        },
        Renamed([
            (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
            ("^conv_in", "input_blocks.0.0"), (r"^controlnet_down_blocks\.(\d)", r"zero_convs.\1.0"),
            ("^controlnet_mid_block", "middle_block_out.0"),
            (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
            (r"^controlnet_cond_embedding\.conv_out", "input_hint_block.14"),
            (r"^controlnet_cond_embedding\.blocks\.(\d)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}"),
            (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{2 * int(m[1]) + int(m[2]) + 1}.0"),
            (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{2 * int(m[1]) + int(m[2]) + 1}.1"),
            (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op"),
            (r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.resnets\.1", "middle_block.2"),
            (r"^mid_block\.attentions\.0", "middle_block.1"),
            (r"^(input_blocks\.\d\.0|middle_block\.[02])\.norm1", r"\1.in_layers.0"),
            (r"^(input_blocks\.\d\.0|middle_block\.[02])\.conv1", r"\1.in_layers.2"),
            (r"^(input_blocks\.\d\.0|middle_block\.[02])\.norm2", r"\1.out_layers.0"),
            (r"^(input_blocks\.\d\.0|middle_block\.[02])\.conv2", r"\1.out_layers.3"),
            ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"), ("^", "control_model."),
        ]),
        {},
    ),
    "Flux3Transformer2DModel": (
        {
            "in_channels": 8, "cond_in_channels": 8, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16, "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        Renamed([
            (r"^timestep_embedder\.linear_1", "time_in.in_layer"),
            (r"^timestep_embedder\.linear_2", "time_in.out_layer"), ("^proj_out", "final_layer.image.linear"),
            (r"^norm_out\.linear", "final_layer.image.adaLN_modulation.1"), (r"^x_embedders\.", "emb_in."),
            (r"^context_embedder\.", "txt_in."), (r"^mode_blocks\.", "content_mode_blocks."),
            (r"^single_transformer_blocks\.", "single_blocks."), (r"\.linear\.weight$", ".lin.weight"),
            ("final_layer.image.lin.weight", "final_layer.image.linear.weight"),
            (r"attn\.to_([qkv])\.", r"\1_proj."), (r"attn\.to_out\.0", "attn_out"),
            (r"attn\.norm_q\.weight", "norm.query_norm.scale"), (r"attn\.norm_k\.weight", "norm.key_norm.scale"),
            (r"ff\.linear_(in|out)", r"mlp_\1"),
        ]),
        {
            "repa_projectors.0.weight": (2, 2),
        },
    ),
    "Krea2Transformer2DModel": (
        {
            "in_channels": 8, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 16,
            "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        Renamed([
            (r"^img_in\.", "first."), (r"^time_embed\.linear_1", "tmlp.0"), (r"^time_embed\.linear_2", "tmlp.2"),
            ("^time_mod_proj", "tproj.1"), (r"^txt_in\.norm\.weight", "txtmlp.0.scale"),
            (r"^txt_in\.linear_1", "txtmlp.1"), (r"^txt_in\.linear_2", "txtmlp.3"), ("^text_fusion", "txtfusion"),
            ("^transformer_blocks", "blocks"), (r"^final_layer\.linear", "last.linear"),
            (r"^final_layer\.norm\.weight", "last.norm.scale"),
            (r"^final_layer\.scale_shift_table", "last.modulation.lin"), (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
            (r"\.attn\.to_out\.0", ".attn.wo"), (r"attn\.to_gate", "attn.gate"),
            (r"attn\.norm_([qk])\.weight", r"attn.qknorm.\1norm.scale"), (r"\.ff\.", ".mlp."),
            (r"norm1\.weight", "prenorm.scale"), (r"norm2\.weight", "postnorm.scale"),
            (r"\.scale_shift_table", ".mod.lin"), ("^", "model.diffusion_model."),
        ]),
        {"model.diffusion_model.blocks.0.mod.lin": (12,)},
    ),
    "MiniMaxH3Transformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 1,
            "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4, "audio_in_channels": 4, "text_dim": 16,
            "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        Renamed([
            ("refiner_blocks", "blocks"), (r"time_embedder\.linear_1", "time_embedder.proj_in"),
            (r"time_embedder\.linear_2", "time_embedder.proj_out"), ("^proj_in", "video_patch_proj"),
            ("^audio_proj_in", "audio_patch_proj"), ("^context_embedder", "condition_proj"),
            (r"^norm_out\.norm", "final_layer.norm"), (r"^norm_out\.linear", "final_layer.adaln_proj.linear"),
            ("^proj_out", "final_layer.video_out"), ("^audio_proj_out", "final_layer.audio_out"),
            (r"attn\.norm_([qk])", r"attn.\1_norm"), (r"attn\.to_out\.0", "attn.out_proj"),
            (r"attn\.to_[qkv]", "attn.qkv_proj"), (r"ff\.net\.0\.proj", "mlp.fc1"), (r"ff\.net\.2", "mlp.fc2"),
            ("^transformer_blocks", "blocks"),
        ]),
        {
            "rope.inv_freq": (2,),
        },
    ),
    "MotionAdapter": (
        {
            "block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_num_attention_heads": 2,
            "motion_norm_num_groups": 4,
        },
        Renamed([
            (r"(motion_modules\.\d)\.", r"\1.temporal_transformer."), (r"\.norm1", ".norms.0"),
            (r"\.norm2", ".norms.1"), (r"\.norm3", ".ff_norm"), (r"\.attn1", ".attention_blocks.0"),
            (r"\.attn2", ".attention_blocks.1"),
        ]),
        {
            "down_blocks.0.pos_encoder.pe": (2,),
        },
    ),
    "QwenImage21Transformer2DModel": (
        {
            "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": 16,
            "axes_dims_rope": (4, 6, 6), "in_channels": 8, "out_channels": 8,
        },
        Renamed([
            (r"img_mlp\.(?:gate_layer|proj)\.weight", "img_mlp.gate_up.weight"), ("^", "model.diffusion_model."),
        ]),
        {},
    ),
    "SparseControlNetModel": (
        {
            "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
            "motion_num_attention_heads": 2, "conditioning_embedding_out_channels": (8, 8),
        },
        Renamed([
            (r"(motion_modules\.\d)\.", r"\1.temporal_transformer."),
            (r"(temporal_transformer.*)\.norm1", r"\1.norms.0"), (r"(temporal_transformer.*)\.norm2", r"\1.norms.1"),
            (r"(temporal_transformer.*)\.norm3", r"\1.ff_norm"),
            (r"(temporal_transformer.*)\.attn1", r"\1.attention_blocks.0"),
            (r"(temporal_transformer.*)\.attn2", r"\1.attention_blocks.1"),
        ]),
        {
            "down_blocks.0.pos_encoder.pe": (2,),
        },
    ),
    "StableCascadeUNet": (
        {
            "conditioning_dim": 16, "block_out_channels": (16, 16), "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 16,
            "clip_text_pooled_in_channels": 16, "clip_image_in_channels": 16,
        },
        Renamed([
            (r"to_[qkv]\.(weight|bias)", r"attn.in_proj_\1"), (r"to_out\.0", "attn.out_proj"),
        ]),
        {},
    ),
    "WanAnimate2Transformer3DModel": (
        {
            "dim": 32, "ffn_dim": 64, "freq_dim": 16, "text_dim": 16, "num_heads": 2, "num_layers": 1,
        },
        Renamed([
            (r"^(blocks\.\d)\.", r"\1.block."), (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".o."),
            ("add_([kv])_proj", r"\1_img"), ("norm_added_k", "norm_k_img"), ("^", "model.diffusion_model."),
        ]),
        {},
    ),
    "WanAnimateTransformer3DModel": (
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 12, "latent_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 5, "image_dim": 16,
            "added_kv_proj_dim": 32, "motion_encoder_size": 16, "motion_style_dim": 16, "motion_dim": 4,
            "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        },
        OfWan([
            (r"^face_adapter\.(\d)\.", r"face_adapter.fuser_blocks.\1."),
            (r"(fuser_blocks\.\d)\.to_q", r"\1.linear1_q"), (r"(fuser_blocks\.\d)\.to_[kv]", r"\1.linear1_kv"),
            (r"(fuser_blocks\.\d)\.to_out", r"\1.linear2"), (r"(fuser_blocks\.\d)\.norm_([qk])", r"\1.\2_norm"),
            ("conv1_local", "conv1_local.conv"), (r"face_encoder\.conv([23])", r"face_encoder.conv\1.conv"),
            (r"motion_encoder\.motion_synthesis_weight", "motion_encoder.dec.direction.weight"),
            (r"motion_encoder\.motion_network", "motion_encoder.enc.fc"),
            (r"motion_encoder\.conv_in\.weight", "motion_encoder.enc.net_app.convs.0.0.weight"),
            (r"motion_encoder\.conv_in\.act_fn", "motion_encoder.enc.net_app.convs.0.1"),
            (r"motion_encoder\.conv_out", "motion_encoder.enc.net_app.convs.8"),
            (r"motion_encoder\.res_blocks\.(\d)", lambda m: f"motion_encoder.enc.net_app.convs.{int(m[1]) + 1}"),
            (r"(convs\.\d)\.conv1\.weight", r"\1.conv1.0.weight"), (r"(convs\.\d)\.conv1\.act_fn", r"\1.conv1.1"),
            (r"(convs\.\d)\.conv2\.weight", r"\1.conv2.1.weight"), (r"(convs\.\d)\.conv2\.act_fn", r"\1.conv2.2"),
            (r"(convs\.\d)\.conv_skip", r"\1.skip.1"),
        ]),
        {
            f"motion_encoder.enc.net_app.convs.{number}.bias": (1, 16, 1, 1)
            for number in ("0.1", "1.conv1.1", "1.conv2.2", "2.conv1.1", "2.conv2.2")
        },
    ),
    "ZImageControlNetModel": (
        {
            "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4,
            "add_control_noise_refiner": "control_layers", "dim": 64, "n_refiner_layers": 1, "n_heads": 2,
            "n_kv_heads": 2,
        },
        Renamed([]),
        {
            "control_noise_refiner.0.x": (2,),
        },
    ),
}  # fmt: skip
"""Arguments, names, and tensors that diffusers drops, or whose shape in the file is another one."""
