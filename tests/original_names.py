"""Small diffusers models as single files in the names of the models' own code, as other tools want them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import LTXVideoTransformer3DModel, SD3Transformer2DModel
from safetensors.torch import save_file

State = dict[str, torch.Tensor]


def sd3_model() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def ltx_model() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64,
        num_layers=2, caption_channels=32,
    )  # fmt: skip


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    scale, shift = tensor.chunk(2)
    return torch.cat([shift, scale])


def sd3_names(state: State) -> State:
    """As Stability's code names the tensors of Stable Diffusion 3.5: q, k and v are one, shift comes before scale."""
    fixed = {
        "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    }  # fmt: skip
    parts = {
        "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj", "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
        "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    }  # fmt: skip
    together = {"attn.to_{}": "x_block.attn", "attn.add_{}_proj": "context_block.attn", "attn2.to_{}": "x_block.attn2"}
    blocks = sorted({int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks.")})
    names = {"pos_embed": state["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        for own, name in fixed.items():
            if f"{own}.{kind}" in state:
                names[f"{name}.{kind}"] = state[f"{own}.{kind}"]
        names[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(state[f"norm_out.linear.{kind}"])
        for block in blocks:
            prefix = f"transformer_blocks.{block}"
            for own, name in parts.items():
                tensor = state.get(f"{prefix}.{own}.{kind}")
                if tensor is not None:
                    last = block == blocks[-1] and own == "norm1_context.linear"
                    names[f"joint_blocks.{block}.{name}.{kind}"] = swapped(tensor) if last else tensor
            for own, name in together.items():
                if f"{prefix}.{own.format('q')}.{kind}" in state:
                    three = [state[f"{prefix}.{own.format(each)}.{kind}"] for each in "qkv"]
                    names[f"joint_blocks.{block}.{name}.qkv.{kind}"] = torch.cat(three)
    return names


def ltx_names(state: State) -> State:
    """As Lightricks' code names the tensors of LTX-Video, all of them only renamed."""
    renamed = {"proj_in.": "patchify_proj.", "time_embed.": "adaln_single.", "norm_q.": "q_norm.", "norm_k.": "k_norm."}
    names = {}
    for own, tensor in state.items():
        name = own
        for after, before in renamed.items():
            name = name.replace(after, before)
        names[name] = tensor
    return names


def single_file(state: State, path: Path, prefix: str = "") -> Path:
    """ComfyUI's files have a ``prefix`` before every name."""
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
