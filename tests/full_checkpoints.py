"""Small whole pipelines in one file, in the names of Stability's and CompVis' own code, as CivitAI has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from original_names import State, sd3_model, sd3_names
from pipelines import clip, clip_tokenizer, saved, t5, t5_tokenizer, vae

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
    "text_model.final_layer_norm": "ln_final", "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}  # fmt: skip


def unet(cross: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=cross,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )  # fmt: skip


def sd15(folder: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: a UNet and a CLIP encoder."""
    torch.manual_seed(3)
    tokenizer = clip_tokenizer(folder.with_name("clip-files"))
    pipeline = StableDiffusionPipeline(
        unet=unet(32), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), vae=vae(),
        text_encoder=clip(tokenizer, 32, projected=False), tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    saved(pipeline, folder, torch.float16)
    return pipeline


def sd2(folder: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 2: its text encoder in the names of OpenCLIP."""
    return sd15(folder)


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL, with two CLIP encoders of different widths, by which diffusers tells them apart."""
    torch.manual_seed(4)
    tokenizer = clip_tokenizer(folder.with_name("clip-files"))
    pipeline = StableDiffusionXLPipeline(
        unet=unet(
            96, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=112,
        ),
        scheduler=EulerDiscreteScheduler(), vae=vae(), text_encoder=clip(tokenizer, 32, projected=False),
        tokenizer=tokenizer, text_encoder_2=clip(tokenizer, 64, projected=True), tokenizer_2=tokenizer,
    )  # fmt: skip
    saved(pipeline, folder, torch.float16)
    return pipeline


def sd3(folder: Path) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3, with all three text encoders."""
    torch.manual_seed(5)
    tokenizer, tokenizer_3 = clip_tokenizer(folder.with_name("clip-files")), t5_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        transformer=sd3_model(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(),
        text_encoder=clip(tokenizer, 32, projected=True), tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, 64, projected=True), tokenizer_2=tokenizer,
        text_encoder_3=t5(tokenizer_3, 64), tokenizer_3=tokenizer_3,
    )  # fmt: skip
    saved(pipeline, folder, torch.float16)
    return pipeline


def unet_names(state: State, layers: int = 1) -> State:
    """As CompVis' and Stability's code names the tensors of a UNet of ``layers`` resnets for each block."""

    def renamed(name: str) -> str:
        for own, other in UNET.items():
            if name.startswith(f"{own}."):
                return name.replace(own, other, 1)
        match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
        assert match, name
        side, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "resnets":
            for own, other in RESNET.items():
                rest = re.sub(rf"^{own}\.", f"{other}.", rest)
        if side == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.{rest.replace('conv.', 'op.', 1)}"
        if kind == "upsamplers":
            attention = any(each.startswith(f"up_blocks.{block}.attentions.") for each in state)
            return f"output_blocks.{(layers + 1) * block + layers}.{2 if attention else 1}.{rest}"
        place = (layers + 1) * block + number
        blocks = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
        return f"{blocks}.{int(kind == 'attentions')}.{rest}"

    return {renamed(name): tensor for name, tensor in state.items()}


def vae_names(state: State) -> State:
    """As CompVis' code names the tensors of its autoencoder; its attention has convolutions for linear layers."""
    blocks = len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")})
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    names = {}
    for name, tensor in state.items():
        changed = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        changed = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", changed)
        changed = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", changed)
        changed = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", changed)
        changed = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}", changed)
        changed = changed.replace("resnets", "block").replace("upsamplers.0", "upsample")
        if "mid_block.attentions.0." in changed:
            changed = changed.replace("mid_block.attentions.0.", "mid.attn_1.")
            for own, other in attention.items():
                changed = changed.replace(f"attn_1.{own}.", f"attn_1.{other}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        names[changed] = tensor
    return names


def clip_names(state: State) -> State:
    """As transformers named the tensors of CLIP before 5.6, with the positions that it kept."""
    names = {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in state.items()}
    return {**names, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip_names(state: State) -> State:
    """As OpenCLIP names the tensors of CLIP: q, k and v are one, and the projection is transposed."""
    names: State = {"logit_scale": torch.ones(())}
    for own, tensor in state.items():
        name = own if own.startswith("text_") else f"text_model.{own}"
        if own == "text_projection.weight":
            names["text_projection"] = tensor.T
        if "_proj." in name and "out_proj" not in name:
            continue
        for theirs, other in OPEN_CLIP.items():
            name = name.replace(theirs, other)
        if own != "text_projection.weight":
            names[name] = tensor
    prefix = "text_model." if any(name.startswith("text_model.") for name in state) else ""
    layers = {name.split("layers.")[1].split(".")[0] for name in state if "layers." in name}
    for layer in layers:
        for kind in ("weight", "bias"):
            parts = [state[f"{prefix}encoder.layers.{layer}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
            names[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return names


def together(path: Path, parts: dict[str, State]) -> Path:
    """One file of several models, each with its prefix."""
    every = {prefix + name: tensor.contiguous() for prefix, state in parts.items() for name, tensor in state.items()}
    save_file(every, path)
    return path


def sd15_file(pipeline: Any, path: Path) -> Path:
    return together(
        path,
        {
            "model.diffusion_model.": unet_names(pipeline.unet.state_dict()),
            "first_stage_model.": vae_names(pipeline.vae.state_dict()),
            "cond_stage_model.transformer.": clip_names(pipeline.text_encoder.state_dict()),
            "": {"alphas_cumprod": torch.ones(10)},
        },
    )


def sd2_file(pipeline: Any, path: Path) -> Path:
    return together(
        path,
        {
            "model.diffusion_model.": unet_names(pipeline.unet.state_dict()),
            "first_stage_model.": vae_names(pipeline.vae.state_dict()),
            "cond_stage_model.model.": open_clip_names(pipeline.text_encoder.state_dict()),
        },
    )


def sdxl_file(pipeline: Any, path: Path) -> Path:
    return together(
        path,
        {
            "model.diffusion_model.": unet_names(pipeline.unet.state_dict()),
            "first_stage_model.": vae_names(pipeline.vae.state_dict()),
            "conditioner.embedders.0.transformer.": clip_names(pipeline.text_encoder.state_dict()),
            "conditioner.embedders.1.model.": open_clip_names(pipeline.text_encoder_2.state_dict()),
        },
    )


def sd3_file(pipeline: Any, path: Path) -> Path:
    t5_state = {name: tensor.clone() for name, tensor in pipeline.text_encoder_3.state_dict().items()}
    return together(
        path,
        {
            "model.diffusion_model.": sd3_names(pipeline.transformer.state_dict()),
            "first_stage_model.": vae_names(pipeline.vae.state_dict()),
            "text_encoders.clip_l.transformer.": clip_names(pipeline.text_encoder.state_dict()),
            "text_encoders.clip_g.transformer.": clip_names(pipeline.text_encoder_2.state_dict()),
            "text_encoders.t5xxl.transformer.": t5_state,
        },
    )
