"""Two-layer models of the architectures that the parity grid covers, with seeded random weights.

Inner sizes are multiples of 64: bitsandbytes' CPU forward (0.50.2, AVX512-BF16) fails on others. ``ODD`` is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HEADS = {"num_attention_heads": 4}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **HEADS}
TEXT = {**SMALL, "vocab_size": 100}
SHORT = {**TEXT, "max_position_embeddings": 512}
"""Where the default is far beyond the tensors, and the library would be asked in a process of its own each time."""


Saved = tuple[Any, torch.dtype, Path]
"""The class of a model, its dtype, and the folder that it was saved in."""

ODD = ("llama-odd",)


def llama(tied: bool, inner: int = 128) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT | {"intermediate_size": inner}, tie_word_embeddings=tied)).bfloat16()


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=100)).bfloat16()


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SHORT, num_key_value_heads=2, num_local_experts=4)).bfloat16()


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "num_key_value_heads": 2,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHORT, **experts)).bfloat16()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100))


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT))


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**TEXT)).half()


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    tokens = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(
        WhisperConfig(d_model=64, **sides, **tokens, num_mel_bins=8, max_source_positions=20)
    )


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**SHORT, num_key_value_heads=2, head_dim=16)).bfloat16()


def vit() -> Any:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8))


TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "llama-tied": lambda: llama(tied=True),
    "llama-untied": lambda: llama(tied=False),
    "llama-fp32": lambda: llama(tied=False).float(),
    "llama-odd": lambda: llama(tied=False, inner=97),
    "t5-encoder": t5,
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "gpt2": gpt2,
    "bert": bert,
    "clip": clip,
    "whisper": whisper,
    "gemma3": gemma3,
    "vit": vit,
}


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    ).bfloat16()


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=32,
    ).half()


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(64, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
    )


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=256,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=32,
    ).bfloat16()


def qwen_image() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    ).bfloat16()


DIFFUSERS: dict[str, Callable[[], Any]] = {"flux": flux, "sd3": sd3, "unet": unet, "wan": wan, "qwen-image": qwen_image}


def build(name: str) -> Any:
    """The model of a name in ``TRANSFORMERS`` or ``DIFFUSERS``, the same weights every time."""
    torch.manual_seed(0)
    return (TRANSFORMERS | DIFFUSERS)[name]().eval()
