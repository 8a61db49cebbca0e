"""What pipelines of diffusers need that their signatures do not tell: components whose sizes fit each other, and
arguments of a call that only the pipeline's code knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from PIL import Image

from whole_zoo.diffusers_inputs import residues
from whole_zoo.input_values import random_values as values

Parts = Mapping[str, Any]
"""Of components: arguments of the constructor, ``class`` for another class than the one annotated, none for one that is
made though it has a default; or, for what is no component, the value itself."""


def parts_needed(pipeline: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern, parts, _ in _NEEDS:
        if re.fullmatch(pattern, pipeline):
            for name, part in parts.items():
                both = isinstance(part, dict) and isinstance(found.get(name), dict)
                found[name] = {**found[name], **part} if both else part
    return found


def arguments_needed(pipeline: str) -> dict[str, Any]:
    """Values by the names of arguments. A function makes its value of the side of a picture, in pixels."""
    return {
        name: value for pattern, _, call in _NEEDS if re.fullmatch(pattern, pipeline) for name, value in call.items()
    }


def _picture(side: int) -> Image.Image:
    return Image.fromarray(numpy.full((side, side, 3), 128, dtype=numpy.uint8))


def _frames(side: int) -> list[Image.Image]:
    return [_picture(side)] * 5


def _latent(side: int) -> torch.Tensor:
    return values(1, 4, side, side)


_OF_EIGHT = {"block_out_channels": [32] * 4, "down_block_types": ["DownEncoderBlock2D"] * 4,
             "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip
"""A latent for eight by eight pixels, as in the published pipelines."""

_OF_PROTEINS = {"class": "RFD4ProteinaScheduler", "schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0,
                "tsr_sigma": 1.0, "tail_steps": 0}  # fmt: skip

IMPOSSIBLE = {
    "(StableDiffusion)?Onnx.*": "its parts are ONNX files, which bitsandbytes does not quantize",
    "KarrasVe.*": "its scheduler is not where this version of diffusers looks for it",
    "VersatileDiffusion(DualGuided|TextToImage)?Pipeline": "joins two UNets whose blocks differ in this version",
    "DiffusionGemma.*|LLaDA2.*": "its constructor does not say of which classes its parts are",
    "Cosmos(?!3).*": "needs cosmos_guardrail, whose models are downloaded when the pipeline is made",
}
"""Pipelines that are not built, and why."""
_GONE = "asks transformers for what version 5 no longer has"
_LARGE = "makes every picture about 1,024 pixels wide and high first, too many for a small model on a CPU"
_NO_CALL = {
    "BlipDiffusion.*": _GONE,
    "ChromaInpaint.*": "asks its transformer for guidance_embeds, which the class does not have",
    "EasyAnimateInpaint.*": "asks its VAE for cache_mag_vae, which the class does not have",
    "HunyuanVideoImageToVideo.*": "looks for tokens that only the published tokenizer has",
    "Kandinsky3Img2Img.*": "asks its VQModel for latent_dist, which the class does not give",
    "Kandinsky5I2I.*|LongCatImageEdit.*|QwenImage(Edit.*|Layered)Pipeline|VisualCloze.*": _LARGE,
    "Kandinsky6SR.*": "takes films of at least 256 by 256 pixels, too many for a small model on a CPU",
    "MusicLDM.*": _GONE,
    "EasyAnimateControl.*": "gives its own encode_prompt an argument that it does not take",
    "LTX2DFRTemporalRefine.*": "takes what another pipeline gives",
}
"""Pipelines that are built and no call of which is known to work, and why."""


def no_call(pipeline: str) -> str:
    return next((why for pattern, why in _NO_CALL.items() if re.fullmatch(pattern, pipeline)), "")


_NEEDS: tuple[tuple[str, Parts, Mapping[str, Any]], ...] = (
    ("AceStep.*", {
        "condition_encoder": {"text_hidden_dim": 64}, "transformer": {"in_channels": 136, "encoder_hidden_size": 32},
    }, {
        "audio_duration": 0.02, "max_text_length": 16, "max_lyric_length": 16,
    }),
    ("Allegro.*", {"transformer": {"attention_head_dim": 24, "cross_attention_dim": 48}}, {}),
    ("Amused.*", {
        "transformer": {"encoder_hidden_size": 64, "cond_embed_dim": 64}, "vqvae": {"num_vq_embeddings": 32},
    }, {}),
    ("AnimateDiff.*ControlNet.*", {}, {"conditioning_frames": _frames}),
    ("AnimateDiffSparse.*", {
        "controlnet": {"block_out_channels": [64, 128], "conditioning_embedding_out_channels": [16, 32]}
    }, {"conditioning_frames": lambda side: [_picture(side)], "controlnet_frame_indices": [0]}),
    ("AnyFlowFAR.*", {}, {"chunk_partition": [1, 1]}),
    ("(AnimateDiff|PIA).*", {"vae": _OF_EIGHT}, {}),
    ("AnimateDiff(VideoToVideo)?ControlNet.*", {
        "controlnet": {"conditioning_embedding_out_channels": [8, 8, 8, 16]},
    }, {}),
    ("AudioLDM2.*", {
        "projection_model": {"text_encoder_dim": 64, "text_encoder_1_dim": 64, "langauge_model_dim": 64},
        "unet": {"cross_attention_dim": [[None, 64, 64], [None, 64, 64]]},
    }, {"max_new_tokens": 8}),
    ("(AudioLDM2?|MusicLDM)Pipeline", {"vae": {"in_channels": 1, "out_channels": 1}}, {}),
    ("AudioLDMPipeline", {"unet": {
        "class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 64,
        "class_embeddings_concat": True, "cross_attention_dim": [64, 128],
    }}, {}),
    ("AuraFlow.*", {"transformer": {"pos_embed_max_size": 1024}}, {}),
    ("BlipDiffusion.*", {}, {
        "prompt": ["a cat"], "source_subject_category": ["cat"], "target_subject_category": ["dog"],
    }),
    ("BriaFibo2.*", {
        "text_encoder": {"text_config.num_hidden_layers": 36}, "transformer": {"cap_feat_dim": 192},
    }, {}),
    ("BriaFibo(Edit)?Pipeline", {"transformer": {"joint_attention_dim": 128}}, {"negative_prompt": "a dog"}),
    ("BriaFiboEdit.*", {}, {"prompt": '{"edit_instruction": "a cat"}'}),
    ("Chroma.*", {"transformer": {"in_channels": 16, "out_channels": 16}}, {}),
    ("CogVideoX.*|ConsisID.*", {}, {"max_sequence_length": 226}),
    ("CogVideoX(FunControl|ImageToVideo).*|ConsisID.*", {"transformer": {"in_channels": 32}}, {}),
    ("CogView4.*", {}, {"negative_prompt": "a dog"}),
    ("CogView4Control.*", {"transformer": {"in_channels": 8, "out_channels": 4}}, {}),
    ("Cosmos3Omni.*", {
        "enable_safety_checker": False, "transformer": {"latent_channel": 16, "patch_latent_dim": 64},
    }, {}),
    ("DiTPipeline", {"transformer": {"in_channels": 4, "out_channels": 8, "sample_size": 8}}, {}),
    ("FluxControl(Img2Img|Inpaint)?Pipeline", {"transformer": {"in_channels": 32, "out_channels": 16}}, {}),
    ("FluxFill.*", {"transformer": {"in_channels": 36, "out_channels": 16}}, {}),
    ("FluxPriorRedux.*", {"image_embedder": {"redux_dim": 64, "txt_in_features": 64}}, {}),
    ("HeliosPipeline", {"scheduler": {"stages": 1}}, {}),
    ("HeliosPyramid.*", {"scheduler": {"gamma": 0.25}}, {}),
    ("(HunyuanDiT|PixArtSigma|StableDiffusion3)PAG.*", {"transformer": {"num_layers": 2}}, {}),
    (
        "GlmImage.*",
        {"vae": {**_OF_EIGHT, "latent_channels": 16}, "transformer": {"prior_vq_quantizer_codebook_size": 256}},
        {},
    ),
    ("HunyuanDiT.*|OmniGen.*|TextToVideoSD.*", {"vae": _OF_EIGHT}, {}),
    ("HunyuanDiTControlNet.*", {
        "transformer": {"num_layers": 4},
        "controlnet": {
            "attention_head_dim": 32, "hidden_size": 64, "cross_attention_dim": 64, "cross_attention_dim_t5": 64,
            "pooled_projection_dim": 64, "text_len": 77, "text_len_t5": 256, "sample_size": 32,
        },
    }, {}),
    ("HunyuanImageRefiner.*", {
        "transformer": {"in_channels": 16, "out_channels": 8, "patch_size": [1, 1, 1], "rope_axes_dim": [4, 6, 6]}
    }, {}),
    ("HunyuanSkyreels.*", {"transformer": {"in_channels": 32, "out_channels": 16}}, {}),
    ("HunyuanVideo15.*", {"transformer": {"in_channels": 9, "out_channels": 4, "image_embed_dim": 64}}, {}),
    ("HunyuanVideoFramepack.*", {"transformer": {"image_proj_dim": 64}}, {}),
    ("HunyuanVideoImageToVideo.*", {
        "transformer": {"in_channels": 33, "out_channels": 16, "image_condition_type": "latent_concat"},
        "text_encoder": {"pad_token_id": 0},
    }, {}),
    ("I2VGenXL.*", {}, {"clip_skip": None}),
    ("IFPipeline", {"unet": {"out_channels": 8}}, {}),
    ("Ideogram4.*", {
        "text_encoder": {"class": "Qwen3VLModel", "text_config.num_hidden_layers": 36},
        "transformer": {"llm_features_dim": 13 * 64}, "unconditional_transformer": {"llm_features_dim": 13 * 64},
    }, {
        "guidance_schedule": [1.0, 1.0], "max_sequence_length": 32,
    }),
    ("Kandinsky5I2I.*", {}, {"max_sequence_length": 512}),
    ("Kandinsky5I2V.*", {"transformer": {"in_visual_dim": 16, "out_visual_dim": 16}}, {}),
    ("Kandinsky6TI2VA.*", {}, {"sample_audio": False}),
    ("Kandinsky(V22|V22Controlnet)Img2Img(Combined)?.*", {}, {"image": _latent}),
    ("Kandinsky(Combined|Img2Img|Img2ImgCombined|Inpaint|InpaintCombined)?Pipeline", {
        "text_encoder": {"transformerDimensions": 64, "numDims": 64},
        "movq": {"latent_channels": 4},
        "unet": {
            "addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj", "encoder_hid_dim": 64,
        },
    }, {}),
    ("KandinskyV22(Img2Img|Inpaint)(Combined)?Pipeline", {"movq": {"latent_channels": 4}}, {}),
    ("KandinskyV22Inpaint(Combined)?Pipeline", {"unet": {"in_channels": 9}}, {}),
    ("KandinskyV22(Img2Img|Inpaint)?(Combined)?Pipeline", {
        "unet": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 64},
    }, {}),
    ("KandinskyV22Controlnet.*", {
        "unet": {
            "addition_embed_type": "image_hint", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 64,
            "in_channels": 8,
        },
        "movq": {"latent_channels": 4},
    }, {"hint": lambda side: values(1, 3, 8 * side, 8 * side)}),
    ("Kandinsky(V22)?(Controlnet)?(Img2Img|Inpaint)?Pipeline", {"unet": {"out_channels": 8}}, {
        "image_embeds": lambda _: values(1, 64), "negative_image_embeds": lambda _: values(1, 64),
    }),
    ("Kandinsky(V22)?(Img2Img|Inpaint)?CombinedPipeline", {"unet": {"out_channels": 8}}, {}),
    ("Krea2.*", {"text_encoder_select_layers": (1,)}, {}),
    ("Kolors.*", {"unet": {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 256,
    }}, {}),
    ("LDMTextToImage.*", {
        "unet": {"class": "UNet2DConditionModel"}, "vqvae": {"latent_channels": 4, "vq_embed_dim": 4},
    }, {}),
    ("LDMSuperResolution.*", {"unet": {"in_channels": 6, "out_channels": 3}}, {}),
    ("LTX2.*", {"connectors": {"text_proj_in_factor": 3}, "audio_vae": {"base_channels": 128}}, {}),
    ("LTX2ImageToVideo.*", {}, {"image_crf": 0}),
    ("LTX2DFR.*", {"transformer": {"use_keyframes_abs_pos_embedding": True}}, {"num_frames": 17}),
    ("LatentConsistencyModel.*", {
        "scheduler": {"class": "LCMScheduler"}, "unet": {"time_cond_proj_dim": 32},
    }, {}),
    ("MotifVideo.*", {"scheduler": {"class": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}}, {}),
    ("MotifVideoImage2Video.*", {"transformer": {"image_embed_dim": 64}}, {}),
    ("NucleusMoE.*", {"transformer": {"in_channels": 64, "out_channels": 16}}, {"return_index": 1}),
    ("SanaVideo.*|SanaImageToVideo.*", {"vae": {"class": "AutoencoderKLWan"}}, {}),
    ("PIA.*", {"unet": {"in_channels": 9}}, {}),
    ("PNDM.*", {}, {"num_inference_steps": 4}),
    ("QwenImage(?!21).*", {"transformer": {"in_channels": 64, "out_channels": 16}}, {}),
    ("QwenImageControlNet.*", {"controlnet": {"in_channels": 64, "out_channels": 16}}, {}),
    ("QwenImageControlNetInpaint.*", {"controlnet": {"extra_condition_channels": 4}}, {}),
    ("RFD4Proteina.*", {
        "bb_ca_scheduler": _OF_PROTEINS, "local_latents_scheduler": _OF_PROTEINS, "recycle_depths": [1, 1],
    }, {
        "output_type": "pt",
        **{name: lambda _, name=name: residues()[name] for name in ("padding_mask", "token_type", "atom37_mask")},
        **{
            name: lambda _, name=name: residues()["conditioning"][name]
            for name in ("is_in_context_conditioning", "supports_local_latent")
        },
        "conditioning_features": lambda _: residues()["conditioning"] | {
            "condition_sequence_1_residue": torch.zeros(1, 8, dtype=torch.long)
        },
    }),
    ("SanaControlNet.*", {"controlnet": {
        "in_channels": 32, "out_channels": 32, "attention_head_dim": 32, "cross_attention_head_dim": 32,
        "cross_attention_dim": 64, "caption_channels": 64,
    }}, {}),
    ("SanaSprint.*", {"scheduler": {"class": "SCMScheduler"}, "transformer": {"guidance_embeds": True}}, {}),
    ("SanaWM.*", {}, {"action": "w-1", "intrinsics": [64.0, 64.0, 32.0, 32.0]}),
    ("ShapE.*", {
        "prior": {
            "encoder_hid_proj_type": None, "added_emb_type": None, "additional_embeddings": 2, "clip_embed_dim": 128,
        },
    }, {}),
    ("ShapEImg2Img.*", {"prior": {"additional_embeddings": 17}}, {}),
    ("StableAudioPipeline", {
        "transformer": {
            "sample_size": 4000, "in_channels": 4, "out_channels": 4, "cross_attention_input_dim": 8,
            "global_states_input_dim": 16,
        },
    }, {}),
    ("StableCascade(Combined|Decoder).*", {
        "prior_prior": {
            "clip_text_in_channels": 64, "clip_text_pooled_in_channels": 64, "clip_image_in_channels": 64,
        },
        "decoder": {
            "effnet_in_channels": 4, "clip_text_in_channels": None, "clip_text_pooled_in_channels": 64,
            "clip_image_in_channels": None,
        },
    }, {"image_embeddings": lambda _: values(1, 4, 8, 8)}),
    ("StableDiffusion(XL)?Adapter.*", {
        "adapter": {"channels": [64, 128], "num_res_blocks": 1, "downscale_factor": 1},
        "unet": {
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
    }, {}),
    ("StableDiffusion(XL)?ControlNetXS.*", {
        "unet": {"layers_per_block": 2, "use_linear_projection": True},
        "controlnet": {
            "block_out_channels": [16, 32], "base_block_out_channels": [64, 128], "cross_attention_dim": 64,
            "conditioning_embedding_out_channels": [8],
        },
    }, {}),
    ("StableDiffusionXLControlNetXS.*", {"controlnet": {"cross_attention_dim": 128}}, {}),
    ("StableDiffusionDepth2Img.*", {
        "depth_estimator": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}, "unet": {"in_channels": 5},
    }, {}),
    ("StableDiffusionLatentUpscale.*", {
        "unet": {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 192},
    }, {}),
    ("StableDiffusion3ControlNet.*", {
        "transformer": {"pooled_projection_dim": 128},
        "controlnet": {"pos_embed_max_size": 64, "patch_size": 2, "pooled_projection_dim": 128},
    }, {}),
    ("StableDiffusion3ControlNetInpainting.*", {"controlnet": {"extra_conditioning_channels": 1}}, {}),
    ("StableUnCLIP.*", {
        "image_normalizer": {"embedding_dim": 64},
        "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 128},
    }, {}),
    ("StableUnCLIPImg2Img.*", {}, {"image": _picture}),
    ("StableVideoDiffusion.*", {"image_encoder": {"image_size": 224}}, {}),
    ("StableDiffusion3Inpaint.*", {
        "transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16},
    }, {}),
    ("StableDiffusionGLIGEN.*", {"unet": {"attention_type": "gated"}}, {}),
    ("StableDiffusionGLIGENTextImage.*", {"unet": {"attention_type": "gated-text-image"}}, {}),
    ("StableDiffusionLDM3D.*", {"vae": {"out_channels": 6}}, {"output_type": "np"}),
    ("StableDiffusionParadigms.*", {"scheduler": {"class": "DDIMParallelScheduler"}}, {}),
    ("StableDiffusionPix2PixZero.*", {}, {
        "source_embeds": lambda _: values(1, 32, 64), "target_embeds": lambda _: values(1, 32, 64),
    }),
    ("StableDiffusionSAG.*", {"scheduler": {"class": "DDIMScheduler"}}, {}),
    ("StableDiffusionDiffEdit.*", {}, {"image_latents": _latent}),
    ("SkyReelsV2DiffusionForcingVideoToVideo.*", {}, {"overlap_history": 1}),
    ("StableAudio3.*", {
        "duration_embedder": {"output_dim": 64}, "transformer": {"io_channels": 32, "local_add_cond_dim": 33},
    }, {
        "duration": 0.01, "audio": lambda _: values(1, 2, 4096), "mask_start_seconds": 0.0, "mask_end_seconds": 0.005,
    }),
    ("UnCLIP.*", {
        "text_proj": {"clip_embeddings_dim": 64, "time_embed_dim": 256, "cross_attention_dim": 64},
        "decoder": {
            "class_embed_type": "identity", "in_channels": 3, "out_channels": 6,
            "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        },
        "super_res_first": {"in_channels": 6, "out_channels": 3},
        "decoder_scheduler": {"variance_type": "learned_range"},
        "super_res_last": {"in_channels": 6, "out_channels": 3},
    }, {}),
    ("UniDiffuser.*", {"text_decoder": {"prefix_inner_dim": 64}}, {}),
    ("UnCLIPImageVariation.*", {}, {"image": _picture, "image_embeddings": None}),
    ("VQDiffusion.*", {
        "learned_classifier_free_sampling_embeddings": {"length": 77, "hidden_size": 64},
        "transformer": {
            "in_channels": None, "num_vector_embeds": 33, "sample_size": 8, "num_embeds_ada_norm": 100,
            "norm_type": "ada_norm",
        },
        "vqvae": {"num_vq_embeddings": 32, "latent_channels": 4, "vq_embed_dim": 4},
        "scheduler": {"num_vec_classes": 33},
    }, {}),
    ("TextToVideoSD.*", {}, {"num_frames": 2}),
    ("TextToVideoZero.*", {"scheduler": {"class": "DDIMScheduler"}}, {
        "num_inference_steps": 4, "t0": 1, "t1": 2, "video_length": 2,
    }),
    ("VisualCloze.*", {}, {
        "task_prompt": "a task", "content_prompt": "a cat",
        "image": lambda side: [[_picture(side)] * 2, [_picture(side), None]],
    }),
    ("WanPipeline", {"transformer_2": {}, "boundary_ratio": 0.875}, {}),
    ("WanAnimate.*", {}, {
        "segment_frame_length": 5, "prompt": None, "prompt_embeds": lambda _: values(1, 16, 64),
        "negative_prompt_embeds": lambda _: values(1, 16, 64),
    }),
    ("(Wan|SkyReelsV2)ImageToVideo.*|ChronoEdit.*", {
        "transformer": {"in_channels": 36, "image_dim": 64, "added_kv_proj_dim": 64},
        "image_encoder": {}, "image_processor": {},
    }, {}),
    ("Wuerstchen.*", {
        "prior": {"c_cond": 64}, "prior_prior": {"c_cond": 64}, "decoder": {"c_cond": 64, "clip_embd": 64},
    }, {"image_embeddings": lambda _: values(1, 4, 6, 6)}),
    ("ZImageControlNet.*", {"transformer": {"in_channels": 4}, "controlnet": {"dim": 64, "control_in_dim": 4}}, {}),
    ("ZImageControlNetInpaint.*", {"controlnet": {"control_in_dim": 9}}, {}),
)  # fmt: skip
