"""What tensors of diffusers' classes are called in the models' own code, as ComfyUI, Forge and InvokeAI want them.

Names only: which part of which tensor is which is learned from diffusers' converters, which also have the last word on
these tables: what a converter does not turn back is refused. From ``loaders/single_file_utils.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Names = Mapping[str, str]
"""Beginning of a name in diffusers, a regular expression in which dots are dots → beginning of the original name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names outside of blocks, and for each list of blocks its original name and the names in a block."""

    top: Names = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, Names]] = field(default_factory=dict)

    def original(self, name: str) -> str:
        """The original name of a tensor; those that become one tensor get the same."""
        for own, (theirs, inside) in self.blocks.items():
            if match := re.match(rf"{re.escape(own)}\.(\d+)\.", name):
                return f"{theirs}.{match[1]}.{_renamed(name[match.end() :], inside)}"
        return _renamed(name, self.top)


def _renamed(name: str, names: Names) -> str:
    for own, theirs in names.items():
        if match := re.match(own.replace(".", r"\.") + r"(?=\.|\Z)", name):
            return match.expand(theirs) + name[match.end() :]
    return name


_FLUX_IN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_FLUX_NORMS = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_[qkv]": "img_attn.qkv",
    "attn.add_[qkv]_proj": "txt_attn.qkv",
    **_FLUX_NORMS,
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin",
    "(?:attn.to_[qkv]|proj_mlp)": "linear1",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
_FLUX_BLOCKS = {
    "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
    "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
}
_FLUX = Layout(
    {
        **_FLUX_IN,
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    },
    _FLUX_BLOCKS,
)
_CHROMA = Layout(
    _FLUX_IN,
    {
        **_FLUX_BLOCKS,
        "distilled_guidance_layer.layers": (
            "distilled_guidance_layer.layers",
            {"linear_1": "in_layer", "linear_2": "out_layer"},
        ),
        "distilled_guidance_layer.norms": ("distilled_guidance_layer.norms", {"weight": "scale"}),
    },
)
_FLUX_2 = Layout(
    {
        **_FLUX_IN,
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        r"((?:double|single)_stream_modulation\w*).linear": r"\1.lin",
    },
    {
        "transformer_blocks": (
            "double_blocks",
            {
                **_FLUX_DOUBLE,
                "ff.linear_in": "img_mlp.0",
                "ff.linear_out": "img_mlp.2",
                "ff_context.linear_in": "txt_mlp.0",
                "ff_context.linear_out": "txt_mlp.2",
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {**_FLUX_SINGLE, "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"},
        ),
    },
)
_SD3 = Layout(
    {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    },
    {
        "transformer_blocks": (
            "joint_blocks",
            {
                r"(attn2?).to_[qkv]": r"x_block.\1.qkv",
                r"(attn2?).to_out.0": r"x_block.\1.proj",
                r"(attn2?).norm_([qk])": r"x_block.\1.ln_\2",
                "attn.add_[qkv]_proj": "context_block.attn.qkv",
                "attn.to_add_out": "context_block.attn.proj",
                "attn.norm_added_([qk])": r"context_block.attn.ln_\1",
                "norm1.linear": "x_block.adaLN_modulation.1",
                "norm1_context.linear": "context_block.adaLN_modulation.1",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
        )
    },
)
_LTX = Layout(
    {"proj_in": "patchify_proj", "time_embed": "adaln_single"},
    {"transformer_blocks": ("transformer_blocks", {r"(attn[12]).norm_([qk])": r"\1.\2_norm"})},
)
_WAN_BLOCK = {
    "scale_shift_table": "modulation",
    "attn1.to_([qkv])": r"self_attn.\1",
    "attn1.to_out.0": "self_attn.o",
    "attn1": "self_attn",
    "attn2.to_([qkv])": r"cross_attn.\1",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_([kv])_proj": r"cross_attn.\1_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "attn2": "cross_attn",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
}
_WAN = Layout(
    {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "scale_shift_table": "head.modulation",
        "proj_out": "head.head",
    },
    {"blocks": ("blocks", _WAN_BLOCK), "vace_blocks": ("vace_blocks", _WAN_BLOCK)},
)
_HUNYUAN_VIDEO = Layout(
    {
        "x_embedder": "img_in",
        "context_embedder.proj_in": "txt_in.input_embedder",
        "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
        "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
        "context_embedder.time_text_embed.text_embedder": "txt_in.c_embedder",
        "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    {
        "context_embedder.token_refiner.refiner_blocks": (
            "txt_in.individual_token_refiner.blocks",
            {
                "attn.to_[qkv]": "self_attn_qkv",
                "attn.to_out.0": "self_attn_proj",
                "norm_out.linear": "adaLN_modulation.1",
                "ff.net.0.proj": "mlp.fc1",
                "ff.net.2": "mlp.fc2",
            },
        ),
        "transformer_blocks": (
            "double_blocks",
            {
                "norm1.linear": "img_mod.linear",
                "norm1_context.linear": "txt_mod.linear",
                "attn.to_[qkv]": "img_attn_qkv",
                "attn.add_[qkv]_proj": "txt_attn_qkv",
                "attn.norm_([qk])": r"img_attn_\1_norm",
                "attn.norm_added_([qk])": r"txt_attn_\1_norm",
                "attn.to_out.0": "img_attn_proj",
                "attn.to_add_out": "txt_attn_proj",
                "ff.net.0.proj": "img_mlp.fc1",
                "ff.net.2": "img_mlp.fc2",
                "ff_context.net.0.proj": "txt_mlp.fc1",
                "ff_context.net.2": "txt_mlp.fc2",
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                "norm.linear": "modulation.linear",
                "(?:attn.to_[qkv]|proj_mlp)": "linear1",
                "attn.norm_([qk])": r"\1_norm",
                "proj_out": "linear2",
            },
        ),
    },
)
_LUMINA_BLOCK = {
    "attn.to_[qkv]": "attention.qkv",
    "attn.to_out.0": "attention.out",
    "attn.norm_([qk])": r"attention.\1_norm",
    "feed_forward.linear_([123])": r"feed_forward.w\1",
    "norm1.linear": "adaLN_modulation.1",
    "norm1.norm": "attention_norm1",
    "norm([12])": r"attention_norm\1",
}
_LUMINA_2 = Layout(
    {
        "time_caption_embed.caption_embedder": "cap_embedder",
        "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "norm_out.linear_1": "final_layer.adaLN_modulation.1",
        "norm_out.linear_2": "final_layer.linear",
    },
    {name: (name, _LUMINA_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
)
_Z_IMAGE_BLOCK = {
    "attention.to_[qkv]": "attention.qkv",
    "attention.to_out.0": "attention.out",
    "attention.norm_([qk])": r"attention.\1_norm",
}
_Z_IMAGE = Layout(
    {"all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder"},
    {name: (name, _Z_IMAGE_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")},
)
_MOCHI = Layout(
    {
        "patch_embed.proj": "x_embedder.proj",
        "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_embed.pooler": "t5_y_embedder",
        "time_embed.caption_proj": "t5_yproj",
        "norm_out.linear": "final_layer.mod",
        "proj_out": "final_layer.linear",
    },
    {
        "transformer_blocks": (
            "blocks",
            {
                "norm1.linear": "mod_x",
                "norm1_context.linear(?:_1)?": "mod_y",
                "attn1.to_[qkv]": "attn.qkv_x",
                "attn1.add_[qkv]_proj": "attn.qkv_y",
                "attn1.norm_([qk])": r"attn.\1_norm_x",
                "attn1.norm_added_([qk])": r"attn.\1_norm_y",
                "attn1.to_out.0": "attn.proj_x",
                "attn1.to_add_out": "attn.proj_y",
                "ff.net.0.proj": "mlp_x.w1",
                "ff.net.2": "mlp_x.w2",
                "ff_context.net.0.proj": "mlp_y.w1",
                "ff_context.net.2": "mlp_y.w2",
            },
        )
    },
)
_AURA_FLOW_MLP = {
    "linear_([12])": r"c_fc\1",
    "out_projection": "c_proj",
}
_AURA_FLOW = Layout(
    {
        "time_step_proj.linear_1": "t_embedder.mlp.0",
        "time_step_proj.linear_2": "t_embedder.mlp.2",
        "context_embedder": "cond_seq_linear",
        "pos_embed.pos_embed": "positional_encoding",
        "pos_embed.proj": "init_x_linear",
        "norm_out.linear": "modF.1",
        "proj_out": "final_linear",
    },
    {
        "joint_transformer_blocks": (
            "double_layers",
            {
                "norm1.linear": "modX.1",
                "norm1_context.linear": "modC.1",
                "attn.to_([qkv])": r"attn.w2\1",
                "attn.to_out.0": "attn.w2o",
                "attn.add_([qkv])_proj": r"attn.w1\1",
                "attn.to_add_out": "attn.w1o",
                **{f"ff.{own}": f"mlpX.{theirs}" for own, theirs in _AURA_FLOW_MLP.items()},
                **{f"ff_context.{own}": f"mlpC.{theirs}" for own, theirs in _AURA_FLOW_MLP.items()},
            },
        ),
        "single_transformer_blocks": (
            "single_layers",
            {
                "norm1.linear": "modCX.1",
                "attn.to_([qkv])": r"attn.w1\1",
                "attn.to_out.0": "attn.w1o",
                **{f"ff.{own}": f"mlp.{theirs}" for own, theirs in _AURA_FLOW_MLP.items()},
            },
        ),
    },
)

LAYOUTS: Mapping[str, Layout] = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": _FLUX_2,
    "SD3Transformer2DModel": _SD3,
    "LTXVideoTransformer3DModel": _LTX,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "Lumina2Transformer2DModel": _LUMINA_2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "MochiTransformer3DModel": _MOCHI,
    "AuraFlowTransformer2DModel": _AURA_FLOW,
    "QwenImageTransformer2DModel": Layout(),
    "HiDreamImageTransformer2DModel": Layout(),
    "ErnieImageTransformer2DModel": Layout(),
    "MotifVideoTransformer3DModel": Layout(),
}
"""By class; without names where the model's own code has diffusers'."""
