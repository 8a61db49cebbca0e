"""Inputs of the model classes of diffusers whose signatures do not tell them: places of tokens, tags of modalities,
lists and pairs, sizes that only the class's code knows. Of the small models that diffusers_cases builds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from whole_zoo.input_values import random_values as values

Inputs = Callable[[], dict[str, Any]]


def inputs_of_class(name: str) -> dict[str, Any] | None:
    """Arguments of the forward of a class; None where they are not written here."""
    return _KNOWN[name]() if name in _KNOWN else None


def _time() -> torch.Tensor:
    return torch.tensor([0.5])


def _whole(*shape: int, below: int = 10) -> torch.Tensor:
    """Whole numbers in turn, from 1 on."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % (below - 1) + 1).reshape(shape)


def _true(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _film(channels: int = 16, **more: Any) -> dict[str, Any]:
    """Two frames, or as many as are told, with a text of 64 channels."""
    return {"hidden_states": values(1, channels, 2, 8, 8), "timestep": _time(),
            "encoder_hidden_states": values(1, 12, 64), **more}  # fmt: skip


def _picture(channels: int, text: int = 64, side: int = 8, **more: Any) -> dict[str, Any]:
    return {"hidden_states": values(1, channels, side, side), "timestep": _time(),
            "encoder_hidden_states": values(1, 12, text), **more}  # fmt: skip


def _sized(**more: Any) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0]])
    return _picture(16, target_size=size, crop_coords=torch.zeros(1, 2), **more)


def _unet(side: int = 16, text: int = 64, **more: Any) -> dict[str, Any]:
    return {"sample": values(1, 4, side, side), "timestep": torch.tensor([1]),
            "encoder_hidden_states": values(1, 12, text), **more}  # fmt: skip


def _rotary(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(length, width), torch.zeros(length, width)


def _minimax_h3() -> dict[str, Any]:
    """Eight tokens of text, eight of video and four of audio in one sequence."""
    return {
        "hidden_states": values(1, 8, 96), "audio_hidden_states": values(1, 4, 32),
        "encoder_hidden_states": values(1, 8, 64), "timestep": torch.tensor([0.5, 0.0]),
        "timestep_indices": torch.zeros(20, dtype=torch.long),
        "token_tags": torch.tensor([0] * 8 + [1] * 8 + [2] * 4), "position_ids": _whole(20, 3),
        "text_indices": torch.arange(8), "video_indices": torch.arange(8, 16), "audio_indices": torch.arange(16, 20),
    }  # fmt: skip


def _cosmos3() -> dict[str, Any]:
    """A text of four tokens and one frame of 2 by 2 patches."""
    picture = torch.arange(4, 8)
    return {
        "input_ids": _whole(4), "text_indexes": torch.arange(4), "position_ids": _whole(3, 8), "und_len": 4,
        "sequence_length": 8, "vision_tokens": [values(1, 48, 1, 4, 4)], "vision_token_shapes": [(1, 2, 2)],
        "vision_sequence_indexes": picture, "vision_mse_loss_indexes": picture,
        "vision_timesteps": torch.full((4,), 0.5), "vision_noisy_frame_indexes": [torch.tensor([0])],
    }  # fmt: skip


def residues(length: int = 8) -> dict[str, Any]:
    """A chain of so many residues, nothing of which is known or asked for."""
    flags, numbers = torch.zeros(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.long)
    of_atoms, of_pairs = torch.zeros(1, length, 37), torch.zeros(1, length, length, dtype=torch.long)
    asked = ("hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord")
    return {
        "padding_mask": ~flags, "token_type": numbers, "atom37_mask": _true(1, length, 37),
        "conditioning": {
            "is_in_context_conditioning": flags, "supports_local_latent": ~flags, "na_ss_state": numbers,
            "na_ss_state_mask": numbers, "token_bond_path_length": of_pairs, "molecule_iid": numbers,
            "molecule_entity_id": numbers, "condition_index-group_1_token": numbers, "charge": of_atoms.long(),
            "element": of_atoms.long(), **{f"condition_{name}_1_atom": of_atoms for name in asked},
        },
    }  # fmt: skip


_KNOWN: dict[str, Inputs] = {
    "AceStepConditionEncoder": lambda: {
        "text_hidden_states": values(1, 12, 16), "text_attention_mask": _whole(1, 12, below=2),
        "lyric_hidden_states": values(1, 12, 16), "lyric_attention_mask": _whole(1, 12, below=2),
        "refer_audio_acoustic_hidden_states_packed": values(1, 16, 8),
        "refer_audio_order_mask": torch.tensor([0]),
    },
    "AceStepTimbreEncoder": lambda: {
        "refer_audio_acoustic_hidden_states_packed": values(1, 16, 8), "refer_audio_order_mask": torch.tensor([0]),
    },
    "AceStepTransformer1DModel": lambda: {
        "hidden_states": values(1, 16, 64), "timestep": _time(), "timestep_r": _time(),
        "encoder_hidden_states": values(1, 12, 64), "context_latents": values(1, 16, 128),
    },
    "AnyFlowTransformer3DModel": lambda: {
        "hidden_states": values(1, 2, 16, 8, 8), "timestep": values(1, 2), "r_timestep": values(1, 2),
        "encoder_hidden_states": values(1, 12, 64),
    },
    "AnyFlowFARTransformer3DModel": lambda: {
        "hidden_states": values(1, 2, 16, 8, 8), "timestep": values(1, 2), "r_timestep": values(1, 2),
        "encoder_hidden_states": values(1, 12, 64), "chunk_partition": [1, 1],
    },
    "AudioLDM2ProjectionModel": lambda: {
        "hidden_states": values(1, 12, 16), "hidden_states_1": values(1, 12, 32),
        "attention_mask": _whole(1, 12, below=2), "attention_mask_1": _whole(1, 12, below=2),
    },
    "AutoencoderKLMiniMaxH3": lambda: {"sample": values(1, 3, 33, 32, 32)},
    "AutoencoderSAME": lambda: {"sample": values(1, 2, 256)},
    "BriaFibo2Transformer2DModel": lambda: {
        **_picture(4), "encoder_hidden_states": values(1, 2, 12, 64), "encoder_attention_mask": _true(1, 12),
    },
    "BriaFiboTransformer2DModel": lambda: {
        "hidden_states": values(1, 16, 64), "timestep": _time(), "encoder_hidden_states": values(1, 12, 64),
        "text_encoder_layers": [values(1, 12, 64)] * 2, "txt_ids": torch.zeros(12, 3), "img_ids": torch.zeros(16, 3),
    },
    "ChronoEditTransformer3DModel": _film,
    "CogView3PlusTransformer2DModel": lambda: _sized(original_size=torch.tensor([[64.0, 64.0]])),
    "CogView4Transformer2DModel": lambda: _sized(original_size=torch.tensor([[64.0, 64.0]])),
    "ControlNetModel": lambda: _unet(controlnet_cond=values(1, 3, 16, 16)),
    "ControlNetUnionModel": lambda: _unet(
        controlnet_cond=[values(1, 3, 16, 16)], control_type=torch.tensor([[1.0, 0, 0, 0, 0, 0]]),
        control_type_idx=[0], conditioning_scale=[1.0],
        added_cond_kwargs={"text_embeds": values(1, 16), "time_ids": values(1, 6)},
    ),
    "Cosmos3OmniTransformer": _cosmos3,
    "CosmosControlNetModel": lambda: {
        "controls_latents": values(1, 18, 2, 8, 8), "latents": values(1, 16, 2, 8, 8), "timestep": _time(),
        "encoder_hidden_states": values(1, 12, 64), "condition_mask": values(1, 1, 2, 8, 8),
        "padding_mask": torch.zeros(1, 1, 64, 64),
    },
    "CosmosTransformer3DModel": lambda: _film(padding_mask=torch.zeros(1, 1, 64, 64)),
    "DreamLiteTransformer2DModel": lambda: {
        "hidden_states": values(1, 32, 8, 8), "encoder_hidden_states": values(1, 12, 16),
    },
    "ErnieImageTransformer2DModel": lambda: {
        "hidden_states": values(1, 128, 4, 4), "timestep": _time(), "text_bth": values(1, 12, 64),
        "text_lens": torch.tensor([12]),
    },
    "FluxControlNetModel": lambda: {
        "hidden_states": values(1, 16, 16), "controlnet_cond": values(1, 16, 16), "timestep": _time(),
        "encoder_hidden_states": values(1, 12, 64), "pooled_projections": values(1, 64),
        "txt_ids": torch.zeros(12, 3), "img_ids": torch.zeros(16, 3),
    },
    "GlmImageTransformer2DModel": lambda: _sized(
        prior_token_id=_whole(1, 16), prior_token_drop=torch.zeros(1, dtype=torch.bool)
    ),
    "HeliosTransformer3DModel": lambda: _film(
        indices_hidden_states=torch.arange(4, 6).unsqueeze(0), indices_latents_history_short=torch.tensor([[3]]),
        indices_latents_history_mid=torch.tensor([[1, 2]]), indices_latents_history_long=torch.tensor([[0, 0, 0, 0]]),
        latents_history_short=values(1, 16, 1, 8, 8), latents_history_mid=values(1, 16, 2, 8, 8),
        latents_history_long=values(1, 16, 4, 8, 8),
    ),
    "HiDreamImageTransformer2DModel": lambda: {
        "hidden_states": values(1, 4, 8, 8), "timesteps": _time(), "pooled_embeds": values(1, 128),
        "encoder_hidden_states_t5": values(1, 12, 64), "encoder_hidden_states_llama3": [values(1, 12, 64)] * 2,
    },
    "HunyuanDiT2DControlNetModel": lambda: _hunyuan_dit(8, 16, 4, 4, 8, 2, controlnet_cond=values(1, 4, 8, 8)),
    "HunyuanDiT2DModel": lambda: _hunyuan_dit(32, 64, 77, 256, 32, 2),
    "HunyuanVideo15Transformer3DModel": lambda: _film(
        65, encoder_attention_mask=_true(1, 12), encoder_hidden_states_2=values(1, 12, 64),
        encoder_attention_mask_2=_true(1, 12), image_embeds=values(1, 4, 1152),
    ),
    "HunyuanVideoFramepackTransformer3DModel": lambda: _film(
        encoder_attention_mask=_true(1, 12), pooled_projections=values(1, 64), guidance=torch.ones(1),
        image_embeds=values(1, 4, 1152), indices_latents=torch.arange(7, 9), latents_clean=values(1, 16, 1, 8, 8),
        latents_history_2x=values(1, 16, 2, 8, 8), latents_history_4x=values(1, 16, 4, 8, 8),
        indices_latents_clean=torch.arange(6, 7), indices_latents_history_2x=torch.arange(4, 6),
        indices_latents_history_4x=torch.arange(4),
    ),
    "I2VGenXLUNet": lambda: {
        "sample": values(1, 4, 2, 8, 8), "timestep": torch.tensor([1]), "fps": torch.tensor([8]),
        "image_latents": values(1, 4, 2, 8, 8), "image_embeddings": values(1, 64),
        "encoder_hidden_states": values(1, 12, 64),
    },
    "Ideogram4Transformer2DModel": lambda: {
        "hidden_states": values(1, 16, 128), "timestep": _time(), "encoder_hidden_states": values(1, 16, 64),
        "position_ids": _whole(1, 16, 3), "segment_ids": torch.ones(1, 16, dtype=torch.long),
        "indicator": torch.tensor([[3] * 4 + [2] * 12]),
    },
    "JoyImageEditPlusTransformer3DModel": lambda: {
        "hidden_states": values(1, 16, 16, 1, 2, 2), "timestep": _time(), "encoder_hidden_states": values(1, 12, 64),
        "shape_list": [[(1, 4, 4)]],
    },
    "Kandinsky5Transformer3DModel": lambda: {
        "hidden_states": values(1, 2, 8, 8, 4), "timestep": _time(), "encoder_hidden_states": values(1, 12, 64),
        "pooled_projections": values(1, 64), "visual_rope_pos": [torch.arange(n) for n in (2, 4, 4)],
        "text_rope_pos": torch.arange(12),
    },
    "Kandinsky6SRTransformer3DModel": lambda: {"hidden_states": values(1, 2, 16, 16, 9), "timestep": _time()},
    "Kandinsky6Transformer3DModel": lambda: {
        "hidden_states": values(1, 2, 8, 8, 9), "timestep": _time(), "encoder_hidden_states": values(1, 12, 64),
        "pooled_projections": values(1, 64), "audio_hidden_states": values(1, 8, 4),
    },
    "Krea2Transformer2DModel": lambda: {
        "hidden_states": values(1, 16, 64), "timestep": _time(), "encoder_hidden_states": values(1, 12, 1, 64),
        "position_ids": _whole(28, 3),
    },
    "LTX2TextConnectors": lambda: {
        "text_encoder_hidden_states": values(1, 8, 128), "attention_mask": torch.ones(1, 8, dtype=torch.long),
    },
    "LTX2VideoDiffusionDecoderModel": lambda: {"z": values(1, 8, 1, 2, 2)},
    "LTX2VideoTransformer3DModel": lambda: {
        "hidden_states": values(1, 32, 128), "audio_hidden_states": values(1, 8, 128),
        "encoder_hidden_states": values(1, 12, 64), "audio_encoder_hidden_states": values(1, 12, 64),
        "timestep": _time(), "num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 8,
    },
    "LuminaNextDiT2DModel": lambda: _picture(
        4, encoder_mask=torch.ones(1, 12, dtype=torch.long), cross_attention_kwargs={},
        image_rotary_emb=torch.polar(torch.ones(64, 64, 16), torch.zeros(64, 64, 16)),
    ),
    "MLPNeRSTFModel": lambda: {"position": values(1, 8, 3), "direction": values(1, 8, 3), "ts": values(1, 8, 1)},
    "MiniMaxH3Transformer3DModel": _minimax_h3,
    "MiniMaxMusic3Transformer1DModel": lambda: {
        "hidden_states": values(1, 128, 16), "timestep": _time(), "encoder_hidden_states": values(1, 16, 64),
    },
    "OmniGenTransformer2DModel": lambda: {
        "hidden_states": values(1, 4, 8, 8), "timestep": _time(), "input_ids": _whole(1, 8),
        "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(1, 25, 25),
        "position_ids": torch.arange(25).unsqueeze(0),
    },
    "PixArtTransformer2DModel": lambda: _picture(
        4, added_cond_kwargs={"resolution": None, "aspect_ratio": None}
    ),
    "PriorTransformer": lambda: {
        "hidden_states": values(1, 64), "timestep": _time(), "proj_embedding": values(1, 64),
        "encoder_hidden_states": values(1, 77, 64), "attention_mask": _true(1, 77),
    },
    "QwenImage21Transformer2DModel": lambda: {
        "hidden_states": values(1, 16, 8), "timestep": _time(), "encoder_hidden_states": values(1, 12, 64),
        "img_shapes": [[(1, 4, 4)]], "img_mask": torch.tensor([[False] * 12 + [True] * 4]),
    },
    "QwenImageControlNetModel": lambda: {
        "hidden_states": values(1, 16, 16), "controlnet_cond": values(1, 16, 16), "timestep": _time(),
        "encoder_hidden_states": values(1, 12, 64), "img_shapes": [[(1, 4, 4)]],
    },
    "RFD4ProteinaAutoencoder": lambda: {
        "z_latent": values(1, 8, 4), "ca_coors_nm": values(1, 8, 3), **residues(),
    },
    "RFD4ProteinaTransformer": lambda: {
        "bb_ca": values(1, 8, 3), "local_latents": values(1, 8, 4), "bb_ca_time": _time(),
        "local_latents_time": _time(), **residues(),
    },
    "SD3ControlNetModel": lambda: _picture(4, pooled_projections=values(1, 64), controlnet_cond=values(1, 4, 8, 8)),
    "SanaControlNetModel": lambda: _picture(4, 8, 32, controlnet_cond=values(1, 4, 32, 32)),
    "SanaWMLTX2RefinerTransformer3DModel": lambda: {
        "hidden_states": values(1, 16, 4), "timestep": torch.full((1, 16), 0.5),
        "encoder_hidden_states": values(1, 12, 16), "video_rotary_emb": _rotary(16, 32),
    },
    "SanaWMTransformer3DModel": lambda: {
        "hidden_states": values(1, 4, 4, 4, 4), "timestep": torch.ones(1, 1, 4, dtype=torch.long),
        "encoder_hidden_states": values(1, 1, 12, 16), "mask": torch.ones(1, 1, 1, 12, dtype=torch.long),
    },
    "SkyReelsV2Transformer3DModel": _film,
    "SparseControlNetModel": lambda: {
        "sample": values(1, 4, 2, 8, 8), "timestep": torch.tensor([1]), "encoder_hidden_states": values(2, 12, 64),
        "controlnet_cond": values(1, 4, 2, 8, 8), "conditioning_mask": torch.ones(1, 1, 2, 8, 8),
    },
    "StableAudio3DiTModel": lambda: {
        "hidden_states": values(1, 64, 16), "timestep": _time(), "encoder_hidden_states": values(1, 12, 64),
        "global_hidden_states": values(1, 64), "local_add_cond": values(1, 64, 16),
    },
    "StableCascadeUNet": lambda: {
        "sample": values(1, 4, 8, 8), "timestep_ratio": _time(), "clip_text_pooled": values(1, 1, 32),
        "clip_text": values(1, 12, 32), "clip_img": values(1, 1, 32),
    },
    "T5FilmDecoder": lambda: {
        "encodings_and_masks": [(values(1, 8, 32), torch.ones(1, 8))], "decoder_input_tokens": values(1, 8, 8),
        "decoder_noise_time": _time(),
    },
    "UNet1DModel": lambda: {"sample": values(1, 2, 64), "timestep": torch.tensor([1])},
    "UNetControlNetXSModel": lambda: _unet(32, controlnet_cond=values(1, 3, 256, 256)),
    "UNetFlatConditionModel": lambda: {
        "sample": values(1, 4, 4, 1), "timestep": torch.tensor([1]), "encoder_hidden_states": values(1, 12, 16),
    },
    "UNetMotionModel": lambda: {
        "sample": values(1, 4, 2, 8, 8), "timestep": torch.tensor([1]), "encoder_hidden_states": values(2, 12, 64),
    },
    "UNetSpatioTemporalConditionModel": lambda: {
        "sample": values(1, 2, 8, 8, 8), "timestep": torch.tensor([1]), "encoder_hidden_states": values(1, 1, 64),
        "added_time_ids": torch.ones(1, 3),
    },
    "UVit2DModel": lambda: {
        "input_ids": _whole(1, 8, 8), "encoder_hidden_states": values(1, 12, 32), "pooled_text_emb": values(1, 32),
        "micro_conds": torch.ones(1, 5),
    },
    "UniDiffuserModel": lambda: {
        "latent_image_embeds": values(1, 4, 16, 16), "image_embeds": values(1, 1, 32),
        "prompt_embeds": values(1, 8, 32), "timestep_img": torch.tensor([1]), "timestep_text": torch.tensor([1]),
    },
    "WanAnimate2Transformer3DModel": lambda: {
        "hidden_states": [values(16, 2, 8, 8)], "timestep": _time(), "encoder_hidden_states": [values(12, 64)],
        "encoder_hidden_states_image": values(1, 4, 1280), "condition_latents": [values(20, 2, 8, 8)],
        "kv_cache": WanAnimate2KVCache(1), "kv_cache_mode": "extract",
        "seq_len": 32, "offset_grid_sizes": torch.tensor([[1, 4, 4]]),
        "reference_grid_sizes": torch.tensor([[1, 4, 4]]),
    },
    "WanAnimateTransformer3DModel": lambda: {
        **_film(36), "encoder_hidden_states_image": values(1, 4, 64), "pose_hidden_states": values(1, 16, 1, 8, 8),
        "face_pixel_values": values(1, 3, 4, 64, 64),
    },
    "WanTransformer3DModel": _film,
    "WanVACETransformer3DModel": lambda: _film(
        control_hidden_states=values(1, 96, 2, 8, 8), control_hidden_states_scale=torch.ones(1)
    ),
    "WuerstchenDiffNeXt": lambda: {
        "x": values(1, 4, 8, 8), "r": _time(), "effnet": values(1, 4, 4, 4), "clip": values(1, 4, 16),
    },
    "WuerstchenPrior": lambda: {"x": values(1, 4, 8, 8), "r": _time(), "c": values(1, 12, 16)},
    "ZImageTransformer2DModel": lambda: {
        "x": [values(16, 1, 8, 8)], "t": _time(), "cap_feats": [values(12, 64)],
    },
}  # fmt: skip


def _hunyuan_dit(
    side: int, text: int, length: int, length_t5: int, head: int, patch: int, **more: Any
) -> dict[str, Any]:
    """Two texts of the lengths that the class is built for."""
    tokens = (side // patch) ** 2
    return {
        "hidden_states": values(1, 4, side, side), "timestep": _time(),
        "encoder_hidden_states": values(1, length, text), "text_embedding_mask": _true(1, length),
        "encoder_hidden_states_t5": values(1, length_t5, text), "text_embedding_mask_t5": _true(1, length_t5),
        "image_meta_size": torch.full((1, 6), 64.0), "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": _rotary(tokens, head), **more,
    }  # fmt: skip


NO_FORWARD = {
    "AutoencoderKLAllegro": "encodes in tiles of 320 by 320 pixels only",
    "ControlNetXSAdapter": "runs inside UNetControlNetXSModel only",
    "MotionAdapter": "runs inside UNetMotionModel only",
    "ShapERenderer": "has no forward: it renders a scene whose weights another model gives it",
    "SpectrogramContEncoder": "asks transformers for what version 5 no longer has",
    "SpectrogramNotesEncoder": "asks transformers for what version 5 no longer has",
    "ZImageControlNetModel": "borrows layers of the transformer that it stands beside",
}
"""Classes that no call by themselves can run, and why."""
