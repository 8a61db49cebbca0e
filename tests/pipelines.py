"""Small pipelines of the libraries' own classes, shaped like FLUX.1, SD3 and SDXL, with real tokenizers; no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT = """a photo of a cat sitting on the moon, a painting of two red foxes in the snow, an astronaut riding a horse,
the quick brown fox jumps over the lazy dog, small boats on a blue lake at dawn, watercolour, oil, pencil, detailed"""
PROMPT = "a painting of a red cat on the moon"


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer with CLIP's files, trained on a few sentences."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trained.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=160, special_tokens=special, end_of_word_suffix="</w>")
    )
    model = json.loads(trained.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer with T5's special tokens, trained on a few sentences."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        [TEXT], trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    )
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=32)


def clip(tokenizer: CLIPTokenizer, width: int, *, projected: bool, layers: int = 2) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=4 * width, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def vae(channels: int = 4, halvings: int = 0) -> AutoencoderKL:
    blocks = halvings + 1
    return AutoencoderKL(
        block_out_channels=(8,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, norm_num_groups=4, latent_channels=channels, sample_size=32,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.3,
    )  # fmt: skip


def saved(pipeline: Any, folder: Path, dtype: torch.dtype) -> Path:
    """As in a repository on the Hub: with a card, a licence, a picture, code, and a single-file copy beside it."""
    pipeline.to(dtype)
    pipeline.save_pretrained(folder, max_shard_size="60KB")
    (folder / "README.md").write_text("---\nlicense: other\n---\n# A pipeline\n")
    (folder / "LICENSE.md").write_text("You may.\n")
    (folder / "dev_grid.jpg").write_bytes(b"\xff\xd8")
    (folder / "flux1-dev.safetensors").write_bytes(b"another layout of the same weights")
    (folder / "pipeline.py").write_text("raise SystemExit('run')\n")
    (folder / "tokenizer" / "vocab.json").write_bytes((folder.with_name("clip-files") / "vocab.json").read_bytes())
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    return folder


def flux(folder: Path, halvings: int = 0) -> Path:
    """FLUX.1-dev: a transformer of two kinds of blocks, a CLIP encoder and a T5.

    ``halvings``, of the picture's sides in its latents: 3 in the real one; with more, a picture has fewer tokens.
    """
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(folder.with_name("clip-files")), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(1, halvings),
        text_encoder=clip(tokenizer, 32, projected=False),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2, 64),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    return saved(pipeline, folder, torch.bfloat16)


def sd3(folder: Path, halvings: int = 0, *, with_t5: bool = True, layers: int = 2, heads: int = 4) -> Path:
    """Stable Diffusion 3: a transformer, two CLIP encoders and a T5, which may be left out.

    ``halvings``: as of ``flux``. ``heads``: of the transformer, which attends to 333 tokens of a text; ``layers``: of
    it and of the CLIP encoders.
    """
    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder.with_name("clip-files"))
    tokenizer_3 = t5_tokenizer() if with_t5 else None
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=layers, attention_head_dim=64 // heads,
        num_attention_heads=heads, joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64,
        out_channels=4, pos_embed_max_size=32,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(halvings=halvings),
        text_encoder=clip(tokenizer, 32, projected=True, layers=layers),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, 32, projected=True, layers=layers),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(tokenizer_3, 64) if tokenizer_3 else None,
        tokenizer_3=tokenizer_3,
    )
    return saved(pipeline, folder, torch.float16)


def sdxl(folder: Path, halvings: int = 0) -> Path:
    """Stable Diffusion XL: a UNet with deep attention and two CLIP encoders, in float32.

    ``halvings``: as of ``flux``.
    """
    torch.manual_seed(2)
    tokenizer = clip_tokenizer(folder.with_name("clip-files"))
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        vae=vae(halvings=halvings),
        text_encoder=clip(tokenizer, 32, projected=False),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, 32, projected=True),
        tokenizer_2=tokenizer,
    )
    return saved(pipeline, folder, torch.float32)
